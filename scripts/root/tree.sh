# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash disable=SC2034
#
# The kernel tree that is built: Debian's source, or the user's, with patches/, rust/,
# Documentation/ and the driver laid over it. Sourced in the build root, never run. Sets $pristine,
# $tree and $want.

# shellcheck source-path=SCRIPTDIR
. "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

tools=$(hash </var/lib/dpkg/status)
driver_dir=drivers/gpu/drm/virtgpu_rs
want=/tmp/want

if [ -n "${KDIR_NAME:-}" ]; then
	source_id=kdir-$(hash <<<"$KDIR_NAME")
	pristine=/kdir
else
	source_package=$(basename /usr/src/linux-source-*.tar.xz .tar.xz)
	source_id=$(dpkg-query --show --showformat '${Version}' "$source_package" | hash)
	pristine=/cache/source-$source_id
fi
tree=/cache/linux-$source_id

# Unpacks Debian's source, once.
ensure_source()
{
	if [ -n "${KDIR_NAME:-}" ] || [ -e "$pristine" ]; then
		return 0
	fi
	lock 9 "/cache/lock/source-$source_id"
	if [ ! -e "$pristine" ]; then
		step 2 "unpacking the kernel's source"
		need_space /cache 6000 "The kernel's source and what is built of it"
		rm -rf "$pristine.partial"
		mkdir "$pristine.partial"
		tar --extract --file "/usr/src/$source_package.tar.xz" --directory "$pristine.partial" --strip-components=1 --no-same-owner
		mv "$pristine.partial" "$pristine"
	fi
	exec 9>&-
}

# Lists the paths that a patch names.
patched_files()
{
	sed -nE 's,^(---|\+\+\+) [ab]/([^\t]+).*,\2,p' /src/patches/*.patch | sort -u
}

# Makes $want, the files of the tree that differ from the pristine one, and $want.removed, the list
# of those that are gone.
make_want()
{
	local file patch

	rm -rf "$want"
	mkdir -p "$want/$driver_dir"
	while read -r file; do
		mkdir -p "$(dirname "$want/$file")"
		[ ! -e "$pristine/$file" ] || cp --no-preserve=mode "$pristine/$file" "$want/$file"
	done < <(patched_files)
	for patch in /src/patches/*.patch; do
		patch --directory "$want" --strip=1 --fuzz=0 --silent --batch --no-backup-if-mismatch <"$patch" >/tmp/patch.log 2>&1 || {
			cat /tmp/patch.log >&2
			die "patches/${patch##*/} does not apply to ${KDIR_NAME:-$source_package}."
		}
	done
	while read -r file; do
		[ -e "$want/$file" ] || echo "$file"
	done < <(patched_files) >"$want.removed"

	for file in rust Documentation; do
		[ ! -d "/src/$file" ] || cp -r --no-preserve=mode "/src/$file" "$want/"
	done
	find /src -maxdepth 1 -type f \( -name '*.rs' -o -name '*.[ch]' -o -name Kconfig -o -name Makefile \) \
		-exec cp --no-preserve=mode --target-directory "$want/$driver_dir" {} +
}

# Says what $want is, by content.
want_id()
{
	{
		(cd "$want" && find . -type f -print0 | sort -z | xargs -0 sha256sum)
		cat "$want.removed"
	} | hash
}

# Makes $tree what it should be. A file whose content is right is not touched, so that make builds
# only what depends on a change. The caller holds the tree's lock. $tree.overlay lists what may
# differ from the pristine source; it is complete at any time, also after a kill.
sync_tree()
{
	local overlay=$tree.overlay directory file source

	touch "$overlay"
	(cd "$want" && find . -type f -printf '%P\n') | sort -u - "$want.removed" "$overlay" >"$overlay.new"
	mv "$overlay.new" "$overlay"

	if [ -n "${KDIR_NAME:-}" ]; then
		mkdir -p "$tree"
		{
			sed 's,^,/,' "$overlay"
			# Directories that only we have.
			sed -n 's,/[^/]*$,,p' "$overlay" | sort -u | while read -r directory; do
				[ -d "/kdir/$directory" ] || echo "/$directory/"
			done
		} >/tmp/exclude
		rsync --recursive --links --perms --checksum --delete --exclude-from=/tmp/exclude \
			--exclude=/.git --exclude='/.config*' --exclude=/include/config --exclude=/include/generated \
			--exclude='/arch/*/include/generated' --exclude='*.o' --exclude='*.a' --exclude='*.ko' --exclude='.*.cmd' --exclude='.*.d' \
			--exclude='*.mod' --exclude='*.mod.c' --exclude='*.order' --exclude='*.rmeta' --exclude='*.so' --exclude='/vmlinux*' \
			--exclude='/modules.*' --exclude=/Module.symvers --exclude='/System.map' \
			/kdir/ "$tree/"
	elif [ ! -e "$tree" ]; then
		rm -rf "$tree.partial"
		cp --archive --link "$pristine" "$tree.partial"
		mv "$tree.partial" "$tree"
	fi

	while read -r file; do
		source=$want/$file
		if [ ! -e "$source" ]; then
			source=$pristine/$file
			if [ ! -e "$source" ] || grep -qxF "$file" "$want.removed"; then
				rm -f "${tree:?}/$file"
				continue
			fi
		fi
		if ! cmp -s "$source" "$tree/$file"; then
			mkdir -p "$(dirname "$tree/$file")"
			# Not in place: the file may be a hard link to the pristine one.
			cp "$source" "$tree/$file.new"
			mv "$tree/$file.new" "$tree/$file"
		fi
	done <"$overlay"
}
