/*
 * PostgreSQL's queue of notifications, as full as it gets: up to 16 that takes 8 GB, unless a listener is put so far behind.
 *
 * As where a listener sits in an open transaction while others notify, all of the queue from its position on is in use,
 * and PostgreSQL refuses to add a page. What it has not read is not there, so it has to end without reading on.
 */
#include "postgres.h"

#include "access/slru.h"
#include "fmgr.h"
#include "storage/lwlock.h"
#include "storage/shmem.h"

PG_MODULE_MAGIC;

#if PG_VERSION_NUM >= 170000
#error "max_notify_queue_pages makes it small"
#endif

/* As in async.c of 15 and 16. */
typedef struct
{
	int			page;
	int			offset;
} Position;

typedef struct
{
	Position	head;
	Position	tail;
	int			stop_page;
	int			first_listener;
	int64		last_warning;
	struct
	{
		int32		pid;
		Oid			database;
		int			next_listener;
		Position	position;
	}			backends[FLEXIBLE_ARRAY_MEMBER];
} Control;

#define PAGES (SLRU_PAGES_PER_SEGMENT * 0x10000)

PG_FUNCTION_INFO_V1(fall_behind);

/* fall_behind(pid, size of the queue's struct): false where that process does not listen. */
Datum
fall_behind(PG_FUNCTION_ARGS)
{
	int			pid = PG_GETARG_INT32(0);
	bool		found;
	Control    *control = ShmemInitStruct("Async Queue Control", PG_GETARG_INT64(1), &found);
	bool		listens = false;

	LWLockAcquire(NotifyQueueLock, LW_EXCLUSIVE);
	for (int i = control->first_listener; i > 0; i = control->backends[i].next_listener)
	{
		if (control->backends[i].pid != pid)
			continue;
		/* The last position that counts as before the head. */
		control->tail.page = (control->head.page + PAGES / 2 + 1) % PAGES;
		control->tail.offset = 0;
		control->stop_page = control->tail.page;
		control->backends[i].position = control->tail;
		listens = true;
	}
	LWLockRelease(NotifyQueueLock);
	PG_RETURN_BOOL(listens);
}
