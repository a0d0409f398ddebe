# shellcheck shell=bash
# A second QEMU beside the machine's own: version 10.0 from bookworm-backports, in a folder.
#
# Relies on common.sh and on Debian 12 (bookworm). The packages are downloaded with apt and
# unpacked, not installed: the machine's packages and its apt configuration stay as they are. What
# lies in the folder is kept for the next time. ADDCOW_MIRROR names another Debian mirror.

qemu10_dir=${ADDCOW_CACHE_DIR:-$repo/target}/qemu-10

# Whether this machine's release is the one that the packages are made for.
qemu10_is_possible() { grep -qx 'VERSION_CODENAME=bookworm' /etc/os-release; }

# Fetches QEMU 10.0 unless it is there already.
need_qemu10() {
    [ ! -e "$qemu10_dir/complete" ] || return 0
    rm -rf "$qemu10_dir"
    mkdir -p "$qemu10_dir"/{lists,archives}/partial "$qemu10_dir/root"
    note "downloading QEMU 10.0 from bookworm-backports into $qemu10_dir"
    logged qemu10 fetch_qemu10
    touch "$qemu10_dir/complete"
}

fetch_qemu10() {
    local mirror=${ADDCOW_MIRROR:-http://deb.debian.org/debian} suite package
    local keyring=/usr/share/keyrings/debian-archive-keyring.gpg
    for suite in bookworm bookworm-backports; do
        echo "deb [signed-by=$keyring] $mirror $suite main"
    done >"$qemu10_dir/sources.list"
    # The lists, the archives and the sources are ours; what is installed is read from the machine,
    # so apt picks just the packages that QEMU 10.0 needs and that are not here in that version.
    local options=(-q -y --no-install-recommends
        -o "Dir::Etc::SourceList=$qemu10_dir/sources.list" -o Dir::Etc::SourceParts=-
        -o "Dir::State::Lists=$qemu10_dir/lists" -o "Dir::Cache::Archives=$qemu10_dir/archives"
        -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache=
        -o Debug::NoLocking=1 -o APT::Sandbox::User=root)
    apt-get "${options[@]}" update || return 1
    apt-get "${options[@]}" -t bookworm-backports --download-only install qemu-system-x86 ||
        return 1
    for package in "$qemu10_dir"/archives/*.deb; do
        dpkg-deb -x "$package" "$qemu10_dir/root" || return 1
    done
    rm -rf "$qemu10_dir/lists" "$qemu10_dir/archives"
}

# Makes `qemu` the version in the folder: its program, shared libraries and firmware.
use_qemu10() {
    local root=$qemu10_dir/root
    qemu=(env "LD_LIBRARY_PATH=$root/usr/lib/x86_64-linux-gnu:$root/lib/x86_64-linux-gnu"
        "QEMU_MODULE_DIR=$root/usr/lib/x86_64-linux-gnu/qemu"
        "$root/usr/bin/qemu-system-x86_64"
        -L "$root/usr/share/qemu" -L "$root/usr/share/seabios" -L /usr/share/seabios)
}

# Makes `qemu` the machine's own version again.
# shellcheck disable=SC2034 # the functions of vm.sh use it
use_system_qemu() { qemu=(qemu-system-x86_64); }
