#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# Builds the programs of selftests/ and runs them; in the build root.
# usage: lab.sh run|test|soak|shell|bench KERNEL CLONE   (names of the kernel's directory in the cache, and of this clone)

# shellcheck source-path=SCRIPTDIR
. "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
# shellcheck source-path=SCRIPTDIR
. "$(dirname "${BASH_SOURCE[0]}")/cargo.sh"

command=$1
use_target "$3"
export VIRTGPU_BUILD=/cache/$2 VIRTGPU_RUN=/src/build/run
log=/cache/log/cargo-$3
mkdir -p "$VIRTGPU_RUN"
read -r -a cases <<<"${CASES:-}"

build_programs()
{
	step 4 "building the test programs"
	cargo "$@" </dev/null 2>&1 | progress "$log" '^ +(Downloaded|Compiling) ' "crates" || explain "$log" "Building the test programs"
}

# Whoever needs it builds it, but then nobody is told how far that is.
build_host()
{
	build_programs build --release --package virtgpu-host --manifest-path host/Cargo.toml
}

# Runs the cases that the user named, or those with $1 in their names. The other arguments are the runner's.
run_cases()
{
	local name status=0

	for name in "${cases[@]:-$1}"; do
		cargo test --release --package virtgpu-lab --test cases -- ${GUESTS:+--test-threads="$GUESTS"} "${@:2}" "$name" || status=$?
	done
	return "$status"
}

cd /src/selftests
if [ "$command" != shell ]; then
	lock 9 "/cache/lock/run-$3"
fi
case $command in
run)
	build_programs build --release --package virtgpu-lab
	[ "${HOST:-}" != reference ] || build_host
	step 5 "running the guest"
	cd /src
	VIRTGPU_RUN=build/run exec "$CARGO_TARGET_DIR/release/virtgpu-lab" run
	;;
shell)
	build_programs build --release --package virtgpu-lab
	step 5 "booting to a shell, C-a x leaves"
	exec "$CARGO_TARGET_DIR/release/virtgpu-lab" shell
	;;
bench)
	build_programs build --release --package virtgpu-bench
	build_host
	step 5 "measuring both drivers"
	VIRTGPU_RUN=/src/build/bench exec "$CARGO_TARGET_DIR/release/virtgpu-bench"
	;;
test)
	build_programs test --no-run --release --workspace
	build_host
	step 5 "running the tests"
	status=0
	if [ "${#cases[@]}" -eq 0 ]; then
		cargo test --release --workspace --lib --bins || status=$?
		cargo test --release --manifest-path host/Cargo.toml || status=$?
	fi
	run_cases "" || status=$?
	exit "$status"
	;;
soak)
	build_programs test --no-run --release --package virtgpu-lab --test cases
	build_host
	step 5 "running the long tests"
	run_cases soak:: --ignored
	;;
esac
