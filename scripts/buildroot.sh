# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
#
# The build root: a Debian with the compilers, QEMU and the kernel's source, so that nothing of what
# the machine has installed matters. Sourced, never run. Sets $repo, $cache and $buildroot.

# shellcheck source-path=SCRIPTDIR
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

# Raise this when the root must be made anew although the lists below are the same.
buildroot_version=2
suite=trixie
kernel_series=linux-source-7
kernel_source=$kernel_series.3
packages=(
	# The kernel.
	build-essential flex bison bc libelf-dev libssl-dev libdw-dev cpio kmod pahole
	rustc rust-src rustfmt rust-clippy cargo bindgen clang-19 lld-19 llvm-19 libclang-19-dev
	# The guest and its host.
	qemu-system-x86 qemu-system-gui qemu-system-modules-opengl virgl-server libegl1
	busybox-static libdrm-tests e2fsprogs kexec-tools
	# The checks.
	perl python3 python3-git python3-ply codespell shellcheck
	# This set-up.
	ca-certificates xz-utils rsync git gdb-minimal
)

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cache=${VIRTGPU_RS_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/virtgpu_rs}
mkdir -p "$cache/lock" "$cache/log" || die "Cannot make $cache: name a writable directory in VIRTGPU_RS_CACHE."
cache=$(cd "$cache" && pwd -P)
buildroot=$cache/buildroot-$(printf '%s\n' "$buildroot_version" "$suite" "$kernel_source" "${packages[@]}" | hash)

# Removes what may belong to the user ids that a root made without privileges is spread over.
remove_root()
{
	[ -e "$1" ] || return 0
	if [ "$(id -u)" -eq 0 ]; then
		rm -rf --one-file-system "$1"
	else
		mmdebstrap --unshare-helper find "$1" -xdev -mindepth 1 -delete
		rmdir "$1"
	fi
}

# The machine's own Debian mirror, if its apt has one: a URI, or nothing, and then mmdebstrap knows
# one.
machine_mirror()
{
	# shellcheck disable=SC2016
	apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(ORIGIN)' 'Created-By: Packages' 'Component: main' 2>/dev/null |
		awk '$2 ~ /^(bullseye|bookworm|trixie|forky|sid|stable|testing|unstable)$/ && ($3 == "Debian" || $1 ~ /\/debian\/?$/) { print $1; exit }'
}

# The machine's proxies, as apt options.
machine_proxies()
{
	apt-config dump 2>/dev/null | grep -E '^Acquire::(http|https)::Proxy' || true
}

# The kernel's source is installed by a hook, because its package may have been replaced by its
# successor. The machine's apt fetches it, which knows how to reach the mirror.
install_source_hook()
{
	# shellcheck disable=SC2016
	printf '%s' '
		set -e
		export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG"
		package='"$kernel_source"'
		if ! apt-cache show "$package" >/dev/null 2>&1; then
			package=$(apt-cache pkgnames '"$kernel_series"'. | sort -V | tail -n 1)
			echo "NOTE: '"$kernel_source"' is gone, its successor $package takes its place"
		fi
		cd "$1/tmp"
		apt-get download "$package"
		chroot "$1" sh -c "dpkg --install /tmp/$package*.deb && rm /tmp/$package*.deb"'
}

# has_ids FILE: whether FILE, which is /etc/subuid or /etc/subgid, has ids for the user, who stands
# there by name or by number.
has_ids()
{
	grep -qE "^($(id -un)|$(id -u)):" "$1"
}

make_buildroot()
{
	local partial=$buildroot.partial log=$cache/log/buildroot mirror apt_options

	lock 8 "$cache/lock/buildroot"
	[ ! -e "$buildroot" ] || return 0
	need_space "$cache" 6000 "The build root"

	if ! command -v mmdebstrap >/dev/null; then
		if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
			die "mmdebstrap is missing: install it, with \"apt-get install mmdebstrap\" on Debian or Ubuntu, and try again."
		fi
		echo "installing mmdebstrap"
		{
			apt-get update &&
				DEBIAN_FRONTEND=noninteractive apt-get install --yes \
					--no-install-recommends mmdebstrap debian-archive-keyring
		} >"$log" 2>&1 </dev/null || explain "$log" "Installing mmdebstrap"
	fi

	# Without privileges a root's files are spread over ids of the user's own.
	if [ "$(id -u)" -ne 0 ] && ! { command -v newuidmap && has_ids /etc/subuid && has_ids /etc/subgid; } >/dev/null 2>&1; then
		die "Without root, this needs newuidmap and ids in /etc/subuid and /etc/subgid: have root run \"apt-get install uidmap\" and \"usermod --add-subuids 100000-165535 --add-subgids 100000-165535 $(id -un)\", or run this as root."
	fi

	remove_root "$partial"
	mirror=$(machine_mirror)
	apt_options=$cache/log/apt-options
	{
		echo "APT::Default-Release \"$suite-backports\";"
		machine_proxies
	} >"$apt_options"
	# The setup hook derives the backports line, so that it names the mirror that is in use.
	# shellcheck disable=SC2016
	mmdebstrap --verbose --variant=minbase \
		--include="$(IFS=,; echo "${packages[*]}")" \
		--aptopt="$apt_options" \
		--setup-hook='sed -n "s/ '"$suite"' main/ '"$suite"'-backports main/p" "$1/etc/apt/sources.list" | head -n 1 >"$1/etc/apt/sources.list.d/backports.list"' \
		--customize-hook="$(install_source_hook)" \
		"$suite" "$partial" ${mirror:+"$mirror"} 2>&1 </dev/null |
		progress "$log" '^(Unpacking|Setting up|Get:)' "packages fetched, unpacked or set up" ||
		explain "$log" "Making the build root"
	grep '^NOTE: ' "$log" || true
	mv "$partial" "$buildroot"
}

ensure_buildroot()
{
	[ ! -e "$buildroot" ] || return 0
	step 1 "making the build root"
	make_buildroot
	exec 8>&-
}

# in_root COMMAND...: runs it in the build root. The paths in there are the same on every machine,
# so that what is built does not depend on where the cache lies: /src is this directory, /cache the
# cache, /kdir the user's kernel tree, /config the user's configuration. Nothing else of the machine
# can be seen, nothing of the build root can be changed, and no process stays behind.
in_root()
{
	local flags=(--mount --pid --fork --kill-child)

	[ "$(id -u)" -eq 0 ] || flags+=(--user --map-root-user)
	unshare "${flags[@]}" true 2>/dev/null ||
		die "This needs root, or user namespaces for unprivileged users (sysctl kernel.unprivileged_userns_clone=1, or kernel.apparmor_restrict_unprivileged_userns=0)."
	unshare "${flags[@]}" bash "$repo/scripts/enter.sh" "$repo" "$cache" "$buildroot" "$@"
}
