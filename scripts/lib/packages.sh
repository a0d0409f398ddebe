# shellcheck shell=bash
# Installs what is missing, with apt, and finds or installs the Rust toolchain.
#
# Relies on common.sh and on a Debian 12 machine (or newer) with its package sources in place.
# Promises to leave alone what is there: a package is installed only when the command or file it
# is wanted for is missing. Never changes the machine's package sources, never runs an upgrade.

apt_updated=no

# apt_install [--try] PACKAGE...: installs the packages without asking anything. With --try a
# failure is returned, else it ends the script.
apt_install() {
    local how=logged
    if [ "$1" = --try ]; then
        how=try_logged
        shift
    fi
    [ "$(id -u)" -eq 0 ] || die "missing: $*; run as root, or run: apt-get install $*"
    command -v apt-get >/dev/null || die "missing: $*; and this machine has no apt-get"
    if [ "$apt_updated" = no ]; then
        note "reading the package lists (apt-get update)"
        # One of the machine's other package sources may be out of order; apt-get install tells.
        try_logged apt-update apt-get -q update ||
            warn "apt-get update failed, going on; its log: $log_dir/apt-update.log"
        apt_updated=yes
    fi
    note "installing with apt: $*"
    "$how" "apt-install-$1" env DEBIAN_FRONTEND=noninteractive \
        apt-get -q -y --no-install-recommends -o DPkg::Lock::Timeout=300 install "$@"
}

# need COMMAND=PACKAGE...: installs the package of every command that is not in PATH. A name with
# a slash is a file that must exist.
need() {
    local pair wanted missing=()
    for pair in "$@"; do
        wanted=${pair%%=*}
        case $wanted in
            */*) [ -e "$wanted" ] ;;
            *) command -v "$wanted" >/dev/null ;;
        esac || missing+=("${pair#*=}")
    done
    [ "${#missing[@]}" -eq 0 ] || apt_install "${missing[@]}"
}

# The oldest Rust that the package accepts, from Cargo.toml.
rust_minimum() { sed -n 's/^rust-version = "\(.*\)"/\1/p' "$repo/Cargo.toml"; }

# Whether the cargo and rustc in PATH exist and are new enough.
rust_is_usable() {
    local have
    command -v cargo >/dev/null && command -v rustc >/dev/null || return 1
    have=$(cd "$repo" && rustc --version 2>/dev/null | awk '{print $2}')
    [ -n "$have" ] && printf '%s\n' "$(rust_minimum)" "$have" | sort -CV
}

# Makes cargo usable: the one in PATH, else the one in ~/.cargo/bin, else Debian's newer one
# (the packages rustc-web and cargo-web: plain rustc of Debian 12 is too old).
need_rust() {
    need cc=gcc /usr/include/stdio.h=libc6-dev /etc/ssl/certs/ca-certificates.crt=ca-certificates
    rust_is_usable || PATH=${CARGO_HOME:-${HOME:-/root}/.cargo}/bin:$PATH
    if ! rust_is_usable; then
        # The -web packages replace the plain ones; a second apt call for the extras keeps a
        # missing formatter from spoiling the compiler's installation.
        apt_install rustc-web cargo-web
        hash -r
        PATH=/usr/bin:$PATH
        apt_install --try rustfmt-web rust-web-clippy || warn "no rustfmt and clippy from apt"
    fi
    rust_is_usable || die "no Rust $(rust_minimum) or newer; found: $(rustc --version 2>&1)"
    note "$(cargo --version), $(rustc --version)"
}
