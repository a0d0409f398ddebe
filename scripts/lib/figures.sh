# shellcheck shell=bash
# Figures that the suites print (tests/common/score.rs): which suites do, and sums over their lines.
#
# To be sourced after common.sh. Lines are read from the file `figures`, which the script sets:
# "scorecard: NAME key=value key=value", any number of a NAME.

figures=

# suites: prints a line "NAME OPTION..." for each test program with figures: its name, and what
# cargo must be told besides.
suites() {
    local file name
    for file in "$repo"/tests/*.rs "$repo"/tests/models/*.rs; do
        grep -qs '\bscore(' "$file" || continue
        name=$(basename "$file" .rs)
        case $name in
            seeded) say "$name --test $name --features seeded-bugs" ;;
            loom | shuttle) say "$name --example $name --features $name" ;;
            *) say "$name --test $name" ;;
        esac
    done
}

# total NAMES KEY: the sum of KEY in the lines of NAMES, a pattern of awk for whole names; nothing
# is printed when no line has it.
total() {
    awk -v names="^($1)\$" -v key="$2" '
        $1 == "scorecard:" && $2 ~ names {
            for (i = 3; i <= NF; i++) {
                split($i, pair, "=")
                if (pair[1] == key) { sum += pair[2]; found = 1 }
            }
        }
        END { if (found) printf "%d\n", sum }' "$figures"
}

# totals: every figure of every suite, summed: "NAME key=value key=value", in the order of the names.
totals() {
    awk '
        $1 == "scorecard:" {
            if (!($2 in order)) { order[$2] = ""; }
            for (i = 3; i <= NF; i++) {
                split($i, pair, "=")
                if (!(($2, pair[1]) in sum)) order[$2] = order[$2] " " pair[1]
                sum[$2, pair[1]] += pair[2]
            }
        }
        END {
            for (name in order) {
                line = name
                count = split(order[name], keys, " ")
                for (i = 1; i <= count; i++) line = line sprintf(" %s=%d", keys[i], sum[name, keys[i]])
                print line
            }
        }' "$figures" | sort
}
