/*
 * Preloaded into a server by the dynamic linker, in place of the C library's malloc: gives no memory where a session asks
 * for that. So it is the server's LD_PRELOAD and a library of C functions at once.
 */
#define _GNU_SOURCE
#include "postgres.h"

#include <errno.h>
#include <link.h>
#include <string.h>

#include "fmgr.h"

PG_MODULE_MAGIC;

extern void *__libc_malloc(size_t size);
extern void *__libc_calloc(size_t number, size_t size);
extern void *__libc_realloc(void *pointer, size_t size);
extern void *__libc_memalign(size_t alignment, size_t size);

/* Nothing is refused while this is false. */
static bool armed;
/* Only what our library asks for itself, which is what Rust allocates. */
static bool only_ours;
static long given_before;
static long most;
static long refused;
static const char *ours_from;
static const char *ours_to;

static int
find_ours(struct dl_phdr_info *info, size_t size, void *argument)
{
	if (strstr(info->dlpi_name, "/pg_writeguard.so") == NULL)
		return 0;
	for (int i = 0; i < info->dlpi_phnum; i++)
	{
		const ElfW(Phdr) *segment = &info->dlpi_phdr[i];

		if (segment->p_type == PT_LOAD && (segment->p_flags & PF_X))
		{
			ours_from = (const char *) info->dlpi_addr + segment->p_vaddr;
			ours_to = ours_from + segment->p_memsz;
		}
	}
	return 1;
}

static bool
refuses(const void *caller)
{
	if (!armed || (only_ours && !((const char *) caller >= ours_from && (const char *) caller < ours_to)))
		return false;
	if (given_before > 0)
	{
		given_before--;
		return false;
	}
	if (refused >= most)
		return false;
	refused++;
	errno = ENOMEM;
	return true;
}

void *
malloc(size_t size)
{
	return refuses(__builtin_return_address(0)) ? NULL : __libc_malloc(size);
}

void *
calloc(size_t number, size_t size)
{
	return refuses(__builtin_return_address(0)) ? NULL : __libc_calloc(number, size);
}

void *
realloc(void *pointer, size_t size)
{
	return refuses(__builtin_return_address(0)) ? NULL : __libc_realloc(pointer, size);
}

int
posix_memalign(void **pointer, size_t alignment, size_t size)
{
	if (refuses(__builtin_return_address(0)))
		return ENOMEM;
	*pointer = __libc_memalign(alignment, size);
	return *pointer ? 0 : ENOMEM;
}

void *
aligned_alloc(size_t alignment, size_t size)
{
	return refuses(__builtin_return_address(0)) ? NULL : __libc_memalign(alignment, size);
}

PG_FUNCTION_INFO_V1(give_no_memory);

/* give_no_memory(only_ours, after, most): so many allocations are given, and then so many are not. */
Datum
give_no_memory(PG_FUNCTION_ARGS)
{
	only_ours = PG_GETARG_BOOL(0);
	given_before = PG_GETARG_INT32(1);
	most = PG_GETARG_INT32(2);
	refused = 0;
	dl_iterate_phdr(find_ours, NULL);
	armed = true;
	PG_RETURN_VOID();
}

PG_FUNCTION_INFO_V1(give_memory);

/* give_memory(): again; how often there was none. */
Datum
give_memory(PG_FUNCTION_ARGS)
{
	armed = false;
	PG_RETURN_INT64(refused);
}
