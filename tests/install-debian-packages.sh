#!/bin/sh
# Install the Debian packages named on the command line, or those that the tests need, as far as they are missing.
set -eu

if [ $# -eq 0 ]; then
    set -- redis-server python3-gi gir1.2-gst-rtsp-server-1.0 \
        gstreamer1.0-plugins-base gstreamer1.0-plugins-good gstreamer1.0-plugins-bad g++ systemd-container
fi

if ! command -v apt-get >/dev/null || ! command -v dpkg-query >/dev/null; then
    echo "$0: this is not Debian or Ubuntu; the tests that need one of these skip unless you installed it: $*" >&2
    exit 0
fi

missing=
for package in "$@"; do
    status=$(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null || true)
    [ "$status" = installed ] || missing="$missing $package"
done
[ -n "$missing" ] || exit 0

as_root=
if [ "$(id -u)" -ne 0 ]; then
    if ! command -v sudo >/dev/null; then
        echo "$0: run as root, or install sudo, or run: apt-get install$missing" >&2
        exit 1
    fi
    as_root=sudo
fi
install="env DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends"
# shellcheck disable=SC2086 # the words are meant to be split
$as_root $install $missing || { $as_root apt-get update && $as_root $install $missing; }
