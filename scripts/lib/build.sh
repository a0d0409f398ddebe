# shellcheck shell=bash
# Builds the release binaries and puts them first in PATH.
#
# Relies on common.sh and on need_rust having run. ADDCOW_BIN_DIR names a folder with `addcow` and
# `addcowd` that are to be used as they are; then nothing is built and no Rust is needed.

# The folder that cargo builds release binaries into.
release_dir() { printf '%s/release' "${CARGO_TARGET_DIR:-$repo/target}"; }

# Whether the binaries are given rather than built.
binaries_are_given() { [ -n "${ADDCOW_BIN_DIR:-}" ]; }

# Builds, unless the binaries are given, and makes `addcow` and `addcowd` callable by name.
build_release() {
    if binaries_are_given; then
        note "using the binaries in ADDCOW_BIN_DIR=$ADDCOW_BIN_DIR"
        bin_dir=$(cd "$ADDCOW_BIN_DIR" && pwd) || die "no folder $ADDCOW_BIN_DIR"
    else
        (cd "$repo" && logged build cargo build --release --locked)
        bin_dir=$(release_dir)
    fi
    if [ ! -x "$bin_dir/addcow" ] || [ ! -x "$bin_dir/addcowd" ]; then
        die "no addcow and addcowd in $bin_dir"
    fi
    PATH=$bin_dir:$PATH
}
