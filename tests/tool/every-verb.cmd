# What every verb refuses, each with one line and nothing changed.
sparse base.img 1M
addcow create -q -b base.img -F raw disk.add-cow
verbs='create info check map resize rebase snapshot reset detach stream commit convert compare
measure adopt export'

# Arguments that the verb would take, but for the disk's name.
arguments() {
    case $1 in
        create) echo "-b base.img -F raw $2" ;;
        resize) echo "$2 +1M" ;;
        rebase) echo "-b base.img -F raw $2" ;;
        snapshot) echo "$2 new.add-cow" ;;
        convert | export) echo "$2 new.img" ;;
        compare) echo "$2 base.img" ;;
        *) echo "$2" ;;
    esac
}

echo '# no such verb, option, disk'
refused addcow strem disk.add-cow
for verb in $verbs; do
    refused addcow $verb --forcce $(arguments $verb disk.add-cow)
done
for verb in $verbs; do
    test $verb = create || refused addcow $verb $(arguments $verb missing.add-cow)
done
refused addcow create missing/new.add-cow 1M

echo '# nothing, or too much'
for verb in $verbs; do
    refused addcow $verb
done
for verb in info check map resize rebase snapshot reset detach stream commit convert compare; do
    refused addcow $verb $(arguments $verb disk.add-cow) more
done

echo '# no size'
for size in '' x 1X 1MB -1 1.2.3 0x 99999999999999999999 16E 1e6 ' 1M' 0 511; do
    refused addcow create new.add-cow "$size"
    refused addcow resize disk.add-cow "$size"
done
for size in '' x 1X -1 16E; do
    refused addcow measure --size "$size"
done
refused addcow map --start-offset 1X disk.add-cow
refused addcow map --max-length 1X disk.add-cow
refused addcow convert -S 1X disk.add-cow new.img
refused addcow create --cluster-size 3k new.add-cow 1M
refused addcow create -o cluster_size=1X new.add-cow 1M

echo '# a file that is there'
sparse new.img 1M
sparse new.add-cow 1M
for verb in create snapshot convert export; do
    refused addcow $verb $(arguments $verb disk.add-cow)
done

echo '# a chain with a cycle'
addcow create -q -b disk.add-cow -F add-cow upper.add-cow
addcow rebase -u -b upper.add-cow -F add-cow disk.add-cow
for verb in map stream commit convert compare reset detach snapshot; do
    refused addcow $verb $(arguments $verb disk.add-cow | sed 's/new\./fresh./')
done
refused addcow check disk.add-cow
refused addcow info --backing-chain disk.add-cow
refused addcow rebase -b base.img -F raw disk.add-cow
addcow rebase -u -b base.img -F raw disk.add-cow

echo '# damaged'
cp disk.add-cow bad.add-cow
poke bad.add-cow 20 '\100'
for verb in $verbs; do
    # The first makes it new; the second finds errors in it, which takes two lines (check.cmd).
    case $verb in create | check) continue ;; esac
    refused addcow $verb $(arguments $verb bad.add-cow | sed 's/new\./fresh./')
done
t addcow check disk.add-cow
