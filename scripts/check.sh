#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# make check

# shellcheck source-path=SCRIPTDIR
. "$(dirname "${BASH_SOURCE[0]}")/buildroot.sh"

ensure_buildroot
in_root scripts/root/check.sh "$(hash <<<"$repo")"
