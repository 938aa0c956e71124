#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# make check; runs in the build root. Every check is made, also after one that failed.
# usage: check.sh CLONE   (name of this clone)

# shellcheck source-path=SCRIPTDIR
. "$(dirname "${BASH_SOURCE[0]}")/tree.sh"
# shellcheck source-path=SCRIPTDIR
. "$(dirname "${BASH_SOURCE[0]}")/cargo.sh"

use_target "$1"
JOBS=${JOBS:-$(nproc)}
objects=/cache/objects-check-$(hash <<<"$tools $source_id")
log=/cache/log/check-$1
failed=()

# check WHAT COMMAND...: shows what the command says only if it fails.
check()
{
	local what=$1 begin=$SECONDS

	shift
	if "$@" >"$log" 2>&1 </dev/null; then
		echo "ok: $what ($((SECONDS - begin)) s)"
	else
		sed "s,$tree/,,g" "$log"
		echo "FAILED: $what"
		failed+=("$what")
	fi
}

# Lists the files of this repository that are written by hand.
sources()
{
	find . -path ./.git -prune -o -path ./build -prune -o -name target -prune -o -type f "$@" -print | sort
}

spdx()
{
	local file status=0

	while read -r file; do
		if ! head -n 3 "$file" | grep -q 'SPDX-License-Identifier: '; then
			echo "$file: no SPDX line"
			status=1
		fi
	done < <(sources \( -name '*.rs' -o -name '*.[ch]' -o -name '*.sh' -o -name '*.toml' -o -name '*.rst' -o -name Kconfig -o -name Makefile \
		-o -path './scripts/configs/*' -o -path ./.ci/run \))
	return "$status"
}

# All that cannot be checked by the compiler is in rust/.
safe_driver()
{
	! grep -nE '\bunsafe\b|\bbindings::' ./*.rs | grep -vE '^[^:]*:[0-9]*:\s*//'
}

no_leftovers()
{
	! sources \( -name '*.rs' -o -name '*.[ch]' -o -name '*.sh' \) ! -path ./scripts/root/check.sh -print0 |
		xargs grep -nE '\b(TODO|FIXME|XXX)\b|\b(todo|unimplemented)!\(|#\[ignore'
}

rust_style()
{
	# All of them, as the kernel's rustfmtcheck has it.
	(cd "$want" && find . -name '*.rs' -printf '%P\n') | sed "s,^,$tree/," |
		xargs rustfmt --check --config-path "$tree/.rustfmt.toml"
}

# Not checked: Signed-off-by is what a person says who mails the patch.
checkpatch()
{
	local status=0 checkpatch=("$tree/scripts/checkpatch.pl" --root="$tree" --strict --terse --show-types --quiet --codespell
		--ignore MISSING_SIGN_OFF)

	# Without git, which takes a patch that it tracks for a source file.
	local -x GIT_DIR=none

	printf '%s\0' patches/*.patch | xargs -0 -n 1 -P "$JOBS" "${checkpatch[@]}" || status=1
	{
		printf '%s\0' ./*.rs Kconfig Makefile
		find rust Documentation -type f ! -name "*.png" -print0
	} | xargs -0 -n 1 -P "$JOBS" "${checkpatch[@]}" --file || status=1
	return "$status"
}

run_make()
{
	make -C "$tree" O="$objects" -j"$JOBS" CLIPPY=1 W=e "$@"
}

# A warning is an error here, so that it comes again until it is mended.
clippy()
{
	mkdir -p "$objects"
	run_make KCONFIG_ALLCONFIG=/src/scripts/configs/guest allnoconfig &&
		run_make "$driver_dir/"
}

# document CRATE OPTION...: Kbuild's own command for the compiler, as it has been run, given to
# rustdoc. "make rustdoc" takes minutes, because it documents Rust's own libraries too, and knows no
# drivers.
document()
{
	local command

	command=$(sed -n 's/^savedcmd_[^ ]* := //p' "$objects/${1%/*}/.${1##*/}.o.cmd")
	shift
	command=$(sed -E "s, clippy-driver , RUSTC_BOOTSTRAP=1 rustdoc $* -Cunsafe-allow-abi-mismatch=fixed-x18 --out-dir /tmp/doc ,
		s, --(emit|remap-path-scope)=[^ ]*,,g; s, --out-dir drivers[^ ]*,," <<<"${command%% ; *}")
	(cd "$objects" && bash -c "$command")
}

# Links of the form srctree/path in the documentation.
source_links()
{
	local file status=0

	while read -r file; do
		if [ ! -e "$tree/$file" ]; then
			echo "srctree/$file does not exist"
			status=1
		fi
	done < <(grep -rhoE --include='*.rs' 'srctree/[A-Za-z0-9_./-]+' "$want" | sed 's,^srctree/,,; s,\.$,,' | sort -u)
	return "$status"
}

ensure_source
step 2 "laying the driver over the kernel's source"
make_want
lock 9 "/cache/lock/linux-$source_id"
sync_tree

step 3 "checking"
check "SPDX lines" spdx
check "no unsafe and no bindings:: in the driver" safe_driver
check "no leftovers" no_leftovers
check "rustfmt of the driver and rust/" rust_style
check "checkpatch.pl --strict" checkpatch
check "shellcheck" shellcheck --external-sources scripts/*.sh scripts/root/*.sh .ci/run
for workspace in selftests selftests/host; do
	check "cargo fmt in $workspace" cargo fmt --all --manifest-path "$workspace/Cargo.toml" --check
	check "cargo clippy in $workspace" cargo clippy --quiet --manifest-path "$workspace/Cargo.toml" --all-targets -- --deny warnings
done
check "make CLIPPY=1 of the kernel crate and the driver" clippy
check "rustdoc of the kernel crate" document rust/kernel
check "rustdoc of the driver" document "$driver_dir/virtgpu_rs" --document-private-items
check "links to the kernel's source" source_links

if [ "${#failed[@]}" -gt 0 ]; then
	die "make check: ${#failed[@]} failed: $(printf '%s; ' "${failed[@]}")"
fi
echo "make check: all passed"
