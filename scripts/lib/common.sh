# shellcheck shell=bash
# What every script shares: messages, numbered steps with the time, logged commands, clean-up.
#
# To be sourced by a script that has `set -euo pipefail`. Sets `repo` (the checkout's top) and
# expects the script to set `log_dir` before it calls `logged`. Registers the EXIT trap, so a
# script hands its own clean-up to `at_exit` instead of setting a trap.
#
# Installs nothing and starts nothing by itself.

repo=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)
program=${0##*/}
# A root shell opened with plain `su` has no sbin in its PATH, and mke2fs lives there.
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
export LC_ALL=C.UTF-8

step_number=0
step_count=0     # 0: print no total
step_title=start
exit_actions=()  # commands for `eval`, run last first

say() { printf '%s\n' "$*"; }

note() { printf '      %s\n' "$*"; }

warn() { printf '%s: warning: %s\n' "$program" "$*" >&2; }

# Ends the script with one line that says where it happened.
die() {
    printf '%s: FAILED in step "%s": %s\n' "$program" "$step_title" "$*" >&2
    exit 1
}

# Seconds since the script began, as m:ss.
elapsed() { printf '%d:%02d' $((SECONDS / 60)) $((SECONDS % 60)); }

# step TITLE: announces the next numbered step.
step() {
    step_title=$1
    step_number=$((step_number + 1))
    if [ "$step_count" -gt 0 ]; then
        printf '\n[%s] %d/%d %s\n' "$(elapsed)" "$step_number" "$step_count" "$step_title"
    else
        printf '\n[%s] %d %s\n' "$(elapsed)" "$step_number" "$step_title"
    fi
}

# at_exit COMMAND: runs COMMAND (one string) when the script ends, however it ends.
at_exit() { exit_actions+=("$1"); }

run_exit_actions() {
    local status=$? i
    trap - EXIT INT TERM HUP
    set +e
    for ((i = ${#exit_actions[@]} - 1; i >= 0; i--)); do
        eval "${exit_actions[i]}"
    done
    exit "$status"
}
trap run_exit_actions EXIT
trap 'printf "\n%s: interrupted in step \"%s\"\n" "$program" "$step_title" >&2; exit 130' INT
trap 'exit 143' TERM HUP

# stop_process PID SECONDS: SIGTERM, then SIGKILL after SECONDS; quiet when it is gone already.
stop_process() {
    local pid=$1 tries=$(($2 * 10))
    kill -TERM "$pid" 2>/dev/null || return 0
    while kill -0 "$pid" 2>/dev/null && [ "$tries" -gt 0 ]; do
        sleep 0.1
        tries=$((tries - 1))
    done
    kill -KILL "$pid" 2>/dev/null
    wait "$pid" 2>/dev/null
    return 0
}

# Prints the end of a log, indented, for a failure message.
show_log_end() { [ -f "$1" ] && tail -n "${2:-25}" "$1" | sed 's/^/    | /' >&2; return 0; }

# logged NAME COMMAND...: runs COMMAND with its output in $log_dir/NAME.log and shows a sign of life
# every 15 seconds. On failure it shows the end of the log and ends the script.
logged() {
    local status=0
    try_logged "$@" || status=$?
    if [ "$status" -ne 0 ]; then
        show_log_end "$log_dir/$1.log"
        die "\`$2\` ended with status $status; whole log: $log_dir/$1.log"
    fi
}

# try_logged NAME COMMAND...: the same, but a failure is only returned.
try_logged() {
    local log=$log_dir/$1.log begin=$SECONDS next=15 status=0
    shift
    mkdir -p "$log_dir"
    "$@" >"$log" 2>&1 </dev/null &
    logged_pid=$!
    while kill -0 "$logged_pid" 2>/dev/null; do
        sleep 0.2
        if [ $((SECONDS - begin)) -ge "$next" ]; then
            note "... $((SECONDS - begin)) s: $(tail -n 1 "$log" | tr -d '\r' | cut -c1-80)"
            next=$((next + 15))
        fi
    done
    wait "$logged_pid" || status=$?
    logged_pid=
    return "$status"
}
logged_pid=
at_exit stop_logged
# The command that `logged` runs must not outlive an interrupted script.
stop_logged() { [ -z "$logged_pid" ] || stop_process "$logged_pid" 5; }
