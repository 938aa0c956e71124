# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
#
# Where cargo puts what it builds. Sourced in the build root, never run.

# use_target CLONE: a directory of the clone's own. A new one begins with the crates that another
# clone has built, but not with its programs.
use_target()
{
	local other package

	export CARGO_TARGET_DIR=/cache/target-$1
	[ ! -e "$CARGO_TARGET_DIR" ] || return 0
	other=$(find /cache -mindepth 1 -maxdepth 1 -name 'target-*' ! -name '*.partial' -print -quit)
	if [ -n "$other" ] && [ -e "$other/release/.cargo-lock" ]; then
		rm -rf "$CARGO_TARGET_DIR.partial"
		# The lock is the one that cargo itself holds while it builds.
		flock "$other/release/.cargo-lock" cp --archive --reflink=auto "$other" "$CARGO_TARGET_DIR.partial"
		sed -n 's/^name = "\(virt.*\)"$/\1/p' /src/selftests/{,*/,*/*/}Cargo.toml | while read -r package; do
			find "$CARGO_TARGET_DIR.partial" -path "*/.fingerprint/$package-*" -delete
		done
		mv -T "$CARGO_TARGET_DIR.partial" "$CARGO_TARGET_DIR"
	fi
}
