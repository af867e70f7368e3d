# The targets call the same scripts as CI; each can be read and run by itself.

CARGO ?= cargo
# Everything that is built for tests, with one set of features, so that it is built once.
FEATURES := pando-engine/daemon,pando-engine/testing
# What is shipped.
SHIPPED := -p pando-engine -p pando -p pando-csi --bins --features pando-engine/daemon

.PHONY: help run test check release bench fuzz-smoke kubernetes prove clean-run

help:
	@echo 'make run         build, make a pool in a file, show a clone of real data with numbers'
	@echo 'make test        install what the tests need, run every test'
	@echo 'make check       format, lints, documentation, policy for dependencies'
	@echo 'make release     build what is shipped: target/dist'
	@echo 'make bench       benchmarks'
	@echo 'make fuzz-smoke  a minute of each fuzz target'
	@echo 'make kubernetes  build a Kubernetes, run pods and a database on volumes and clones'
	@echo 'make prove       with HOURS=n: every campaign of crashes, faults and kills, and a report'
	@echo 'make clean-run   remove what `make run` made'

run:
	@scripts/demo

test:
	@scripts/test $(ARGS)

check:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --features $(FEATURES) -- -D warnings
	$(CARGO) clippy $(SHIPPED) -- -D warnings
	$(CARGO) clippy -p pando-sim --no-default-features --features shuttle --test shuttle -- -D warnings
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --workspace --no-deps --features $(FEATURES)
	@scripts/deny

release:
	@scripts/release

bench:
	@scripts/bench $(ARGS)

fuzz-smoke:
	@scripts/fuzz-smoke

kubernetes:
	@scripts/kubernetes $(ARGS)

prove:
	@scripts/prove '$(HOURS)' $(ARGS)

clean-run:
	@scripts/demo --clean
