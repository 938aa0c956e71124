#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# Builds the kernel; runs in the build root. Leaves what it built in a directory of the cache that
# is named after everything that went in, and links to it in build/.
# usage: kernel.sh CACHE   (the path of the cache on the machine, for the links)

# shellcheck source-path=SCRIPTDIR
. "$(dirname "${BASH_SOURCE[0]}")/tree.sh"

outside=$1
JOBS=${JOBS:-$(nproc)}

# The configuration: a fragment, over allnoconfig. Two of its comments mean something: "# with:
# guest" puts another fragment before it, and "# make: LLVM=-19" is given to make.
name=${KERNEL_CONFIG:-guest}
fragment=/src/scripts/configs/$name
if [ -e /config ]; then
	name=$(basename "$name")-$(hash </config)
	fragment=/config
fi
base=$(sed -n 's,^# with: ,/src/scripts/configs/,p' "$fragment")
cat ${base:+"$base"} "$fragment" >/tmp/fragment
if [ "${DRM_VIRTGPU_RS:-m}" = y ]; then
	sed -i -E '/^CONFIG_DRM_VIRT(GPU_RS|IO_GPU(_KMS)?)=/d' /tmp/fragment
	printf 'CONFIG_DRM_VIRTGPU_RS=y\n' >>/tmp/fragment
fi
read -r -a make_arguments < <(sed -n 's/^# make: //p' /tmp/fragment) || true

# Sets $out.
name_result()
{
	local source=$source_id

	if [ -n "${KDIR_NAME:-}" ]; then
		# Its content is not known by name: the copy's state stands for it, in which only
		# what differed has a new time.
		source=$(cd "$tree" && find . -type f -printf '%P %s %T@\n' | sort | hash)
	fi
	out=/cache/kernel-$name-$(
		{
			echo "$tools $source $(want_id)"
			cat /tmp/fragment "${BASH_SOURCE[0]}"
		} | hash
	)
}

# Removes targets that a killed build has begun and not finished: the .cmd file is written after its
# target.
remove_unfinished()
{
	local command target

	find "$objects" -name '.*.cmd' -print0 | while IFS= read -r -d '' command; do
		target=${command##*/.}
		target=${command%/*}/${target%.cmd}
		if [ "$target" -nt "$command" ]; then
			rm -f "$target"
		fi
	done
}

run_make()
{
	make -C "$tree" O="$objects" -j"$JOBS" "${make_arguments[@]}" \
		KBUILD_BUILD_TIMESTAMP=@0 KBUILD_BUILD_USER=virtgpu_rs KBUILD_BUILD_HOST=localhost "$@" </dev/null 2>&1
}

configure()
{
	local state option needed log=/cache/log/configure-$name

	state=$({
		cat /tmp/fragment
		find "$want" -name 'Kconfig*' -exec cat {} +
	} | hash)
	if [ "$(cat "$objects/.configured" 2>/dev/null)" = "$state" ]; then
		return 0
	fi
	run_make KCONFIG_ALLCONFIG=/tmp/fragment allnoconfig >"$log" || explain "$log" "Configuring the kernel"
	# A configuration of ours is for the kernel that is ours. Of what others ask for, in this or
	# another kernel, some may be no more.
	needed=^CONFIG_
	if [ "$fragment" = /config ] || [ -n "${KDIR_NAME:-}" ]; then
		needed='^CONFIG_(RUST|DRM_VIRTGPU_RS)='
	fi
	# What is said of an option last, counts.
	while read -r option; do
		if [ "${option#*=}" = n ]; then
			! grep -q "^${option%n}" "$objects/.config"
		else
			grep -qxF "$option" "$objects/.config"
		fi || die "$option is lost in the configuration: what it depends on is off (see drivers/gpu/drm/virtgpu_rs/Kconfig for the driver's), or the kernel has no such option."
	done < <(tac /tmp/fragment | awk -F = '/^CONFIG_/ && !seen[$1]++' | grep -E "$needed")
	echo "$state" >"$objects/.configured"
}

build()
{
	local log=/cache/log/kernel-$name partial=$out.partial

	objects=/cache/objects-$name-$(hash <<<"$tools $source_id")
	need_space /cache 2000 "The kernel's build"
	mkdir -p "$objects"
	if [ -e "$objects/.building" ]; then
		echo "the last build was interrupted: going on from there"
		remove_unfinished
	fi
	touch "$objects/.building"
	configure
	run_make bzImage modules | progress "$log" '^  [A-Z]' "files" || explain "$log" "Building the kernel"
	rm "$objects/.building"

	rm -rf "$partial"
	mkdir -p "$partial/modules"
	cp "$objects/arch/x86/boot/bzImage" "$objects/vmlinux" "$partial/"
	cp "$objects/.config" "$partial/config"
	find "$objects" -name '*.ko' -exec cp --target-directory "$partial/modules" {} +
	mv --no-target-directory "$partial" "$out"
	# Nobody has asked for these in a week.
	find /cache -mindepth 1 -maxdepth 1 -name 'kernel-*' -mtime +7 -exec rm -rf {} +
}

ensure_source
step 2 "laying the driver over the kernel's source"
make_want
[ -n "${KDIR_NAME:-}" ] || name_result
if [ -z "${KDIR_NAME:-}" ] && [ -e "$out" ]; then
	step 3 "the kernel is built already"
else
	lock 9 "/cache/lock/linux-$source_id"
	sync_tree
	name_result
	if [ ! -e "$out" ]; then
		step 3 "building the kernel, configuration $name"
		build
	fi
	exec 9>&-
fi
touch "$out"

mkdir -p /src/build
ln -sfn "$outside/${out##*/}" /src/build/kernel
for file in bzImage vmlinux modules config; do
	ln -sfn "$outside/${out##*/}/$file" "/src/build/$file"
done
