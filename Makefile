# PG_CONFIG chooses the server: make test PG_CONFIG=/usr/lib/postgresql/17/bin/pg_config

.PHONY: help all prepare prepare-build prepare-deb prepare-rpm prepare-matrix demo test test-all test-upstream test-assert test-pure test-packages install deb rpm tarball dist release deny bench lint clean

help:
	@echo "make demo      the incident, refused: a transcript on a server made for it (KEEP=1 keeps it)"
	@echo "make test      all tests, on private servers (NAME='undo capture': those files of tests/, or tests of such names)"
	@echo "make test-all  the same on each supported server (PGWG_MAJORS='15 17'); as root"
	@echo "make test-upstream  PostgreSQL's own regression and isolation tests, with the library and a policy over everything"
	@echo "make test-assert  both on a server built with assertions, short sets under valgrind and debug_discard_caches (an hour)"
	@echo "make test-pure  the tests of what needs no PostgreSQL, in seconds"
	@echo "make test-packages  the archives and the package, in a clean root of Debian (PGWG_MAJORS='15 17 18 19'); as root"
	@echo "make install   build and install into the server that PG_CONFIG names (DESTDIR=... below another directory)"
	@echo "make deb       a Debian package for the server that PG_CONFIG names, in target/deb"
	@echo "make rpm       an RPM for PGDG's server of that version, in target/rpm"
	@echo "make tarball   lib/ and share/extension/ for that version, for extension_control_path and image volumes, in target/tarball"
	@echo "make dist      the source archives of what is committed, in target/dist"
	@echo "make release   all of these and the SBOM, with checksums, in target/dist (PGWG_MAJORS='15 17 18 19')"
	@echo "make deny      the crates' licences, origins and known vulnerabilities, against deny.toml"
	@echo "make bench     measure what docs/performance.md claims"
	@echo "make lint      formatting and clippy, warnings denied"
	@echo "make prepare   install what building and testing need and this machine lacks; the other targets do it by themselves"
	@echo "               less: prepare-build, prepare-deb, prepare-rpm; with what other servers need: prepare-matrix"
	@echo "make clean     remove what was built"

# Each installs what is lacking for its purpose, and says what; scripts/prepare has the purposes.
prepare:
	@scripts/prepare

# No more than that, for it may be a production server.
prepare-build:
	@scripts/prepare build

prepare-deb:
	@scripts/prepare deb

prepare-rpm:
	@scripts/prepare rpm

prepare-matrix:
	@scripts/prepare matrix

# Says what it will do before it prepares the same as prepare-build.
demo:
	@scripts/demo

test: prepare
	@scripts/test $(NAME)

test-all: prepare-matrix
	@scripts/test-all

test-upstream: prepare
	@scripts/test-upstream

test-assert: prepare
	@scripts/test-assert

test-pure:
	@scripts/test-pure

test-packages: prepare
	@set -e; for major in $(or $(PGWG_MAJORS),15); do scripts/test-packages $$major; done

deb: prepare-deb
	@scripts/deb

rpm: prepare-rpm
	@scripts/rpm

# With the crates' licences in it, of which python3 knows.
tarball: prepare-rpm
	@scripts/tarball

dist:
	@scripts/dist

release: prepare
	@scripts/release

deny: prepare-build
	@scripts/deny

# As pgxn asks for it, before it asks for install.
all: prepare-build
	@bash -euc '. scripts/environment; choose_server; register_server; build_library'

install: prepare-build
	@scripts/install

bench: prepare
	@benches/run

lint: prepare-build
	@cargo fmt --version >/dev/null 2>&1 || rustup component add rustfmt
	@cargo clippy --version >/dev/null 2>&1 || rustup component add clippy
	@bash -euc '. scripts/environment; choose_server; \
	  cargo fmt --check; \
	  cargo clippy $$(cargo_features) --workspace --all-targets -- -D warnings'

clean:
	cargo clean
