# What every case in this folder starts with. Cases run in an empty folder, with `sh -eu`.

# Shows a command, runs it, and shows its exit code unless that is 0.
t() {
    echo "\$ $*"
    "$@" && status=0 || status=$?
    test "$status" = 0 || echo "[exit $status]"
}

# Everything about the files here that a failing command must leave alone. Folders change their
# time when a temporary file comes and goes, which is no harm.
state() {
    find . -type d -printf '%p %y %m\n' -o -printf '%p %y %m %s %b %i %n %T@ %l\n' | sort
    find . -type f -size -4M -exec cksum {} + | sort
}

# The same as t for a command that must fail, with one line on standard error, and change nothing.
refused() {
    state > ../before
    echo "\$ $*"
    "$@" 2> ../error && status=0 || status=$?
    cat ../error
    test "$(wc -l < ../error)" = 1 || echo "NOT ONE LINE"
    echo "[exit $status]"
    test "$status" != 0 || echo "NOT REFUSED"
    state > ../after
    cmp ../before ../after || echo "SOMETHING CHANGED"
}

# Makes a file of SIZE bytes, all of them holes.
sparse() {
    truncate -s "$2" "$1"
}

# Puts bytes, written for printf(1), at an offset of a file.
poke() {
    printf "$3" | dd of="$1" bs=1 seek="$2" conv=notrunc status=none
}

# Fills clusters of 64 KiB of a file: fill_clusters FILE FIRST COUNT.
fill_clusters() {
    tr '\0' x < /dev/zero | head -c "$((65536 * $3))" |
        dd of="$1" bs=65536 seek="$2" conv=notrunc iflag=fullblock status=none
}

# Dumps LENGTH bytes at OFFSET of a file.
dump() {
    od -A x -t x1 -j "$2" -N "$3" "$1"
}

# Length of files in bytes.
lengths() {
    stat -c '%n %s' "$@"
}

# Serves a disk until unserve: serve DISK [OPTION...].
serve() {
    served=$1
    shift
    addcowd --blk-file "$served" --socket-path ../socket "$@" 2> ../daemon &
    daemon=$!
    until test -S ../socket; do
        kill -0 "$daemon" || return 1
        sleep 0.01
    done
}

# Ends the daemon.
unserve() {
    kill "$daemon"
    wait "$daemon" || true
}

# Hides what depends on the file system: how much space a file takes.
hide_sizes() {
    sed -E -e 's/^( *((image|overlay) )?disk size): .*/\1: .../' \
        -e 's/("((image|overlay)-)?actual-size"): [0-9]+/\1: .../'
}
