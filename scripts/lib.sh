# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
#
# What the scripts share, on the machine and in the build root. Sourced, never run.

set -euo pipefail

die()
{
	printf '%s\n' "$*" >&2
	exit 1
}

# step NUMBER TEXT: says which of the $STEPS steps of this target has begun.
step()
{
	step_name="[$1/${STEPS:-$1}] $2"
	printf '%s\n' "$step_name"
}

# progress LOG PATTERN WHAT: keeps stdin in LOG, and says every 15 seconds how many of its lines
# match PATTERN.
progress()
{
	local line count=0 next=$((SECONDS + 15)) status

	: >"$1"
	while true; do
		status=0
		IFS= read -r -t 5 line || status=$?
		if [ "$status" -eq 0 ]; then
			printf '%s\n' "$line" >>"$1"
			[[ $line =~ $2 ]] && count=$((count + 1))
		elif [ "$status" -le 128 ]; then
			break
		fi
		if [ "$SECONDS" -ge "$next" ]; then
			printf '%s: %s %s so far\n' "$step_name" "$count" "$3"
			next=$((SECONDS + 15))
		fi
	done
}

# explain LOG WHAT: ends with one sentence on why WHAT failed, after the lines of LOG that matter if
# the reason is not a common one.
explain()
{
	if grep -q 'No space left on device' "$1"; then
		die "$2 failed: the disk is full. Free some space, or name another directory in VIRTGPU_RS_CACHE."
	fi
	if grep -qE 'Temporary failure resolving|Could not resolve|Could not connect|Unable to connect|Network is unreachable|network error' "$1"; then
		die "$2 failed: the server cannot be reached. Check the network, and the machine's configuration of apt and cargo."
	fi
	grep -nE '(error|warning)(\[|:| )|\*\*\*|^E:' "$1" | tail -n 40 >&2 || true
	tail -n 15 "$1" >&2
	die "$2 failed: the lines above are from log/${1##*/} in the cache."
}

# need_space DIRECTORY MEGABYTES WHAT
need_space()
{
	local free

	free=$(($(df --output=avail -m "$1" | tail -n 1)))
	if [ "$free" -lt "$2" ]; then
		die "$3 needs $2 MB in $1, where $free MB are free: free some, or name another directory in VIRTGPU_RS_CACHE."
	fi
}

# lock FD FILE: takes the lock FILE, for as long as descriptor FD is open.
lock()
{
	eval "exec $1>\"\$2\""
	if ! flock -n "$1"; then
		echo "waiting for another run that uses ${2##*/}"
		flock "$1"
	fi
}

# hash: a short name for what stdin says.
hash()
{
	sha256sum | cut -c 1-16
}
