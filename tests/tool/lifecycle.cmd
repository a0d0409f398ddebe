# The life of a disk: each verb works on what the one before it left, and the bytes stay right.
fill_clusters base.img 0 32
truncate -s 4M base.img
cp base.img golden.img

echo '# an overlay, into which a guest has written'
t addcow create -b base.img -F raw --cluster-size 64k vm.add-cow
poke vm.add-cow 65536 '\002\000\001'
poke vm.raw 65536 'one'
poke vm.raw 1048576 'sixteen'
cp base.img expected.img
for cluster in 1 16; do
    dd if=vm.raw of=expected.img bs=65536 count=1 skip=$cluster seek=$cluster conv=notrunc status=none
done
same() {
    addcow compare -F raw "$1" expected.img
}
t same vm.add-cow
t addcow info vm.add-cow | hide_sizes
t addcow map --picture vm.add-cow

echo '# frozen below a new overlay, and streamed out of it'
t addcow snapshot vm.add-cow now.add-cow
t same now.add-cow
t addcow info --backing-chain now.add-cow | hide_sizes | grep -e '^image:' -e '^backing'
t addcow rebase -b base.img -F raw now.add-cow
t same now.add-cow
t addcow check now.add-cow
t addcow stream now.add-cow
t same now.add-cow
t addcow detach now.add-cow
cmp now.raw expected.img

echo '# larger, and smaller again'
t addcow resize vm.add-cow +1M
t addcow resize --shrink vm.add-cow 4M
t same vm.add-cow

echo '# out as a copy, and in again as an overlay of what differs'
t addcow convert vm.add-cow flat.img
cmp flat.img expected.img
t addcow convert -f raw -O add-cow -B base.img -F raw -o cluster_size=64k flat.img small.add-cow
t same small.add-cow
t addcow map --picture small.add-cow

echo '# down into the base'
t addcow commit small.add-cow
t same small.add-cow
cmp base.img expected.img
t addcow info small.add-cow | grep 'allocated clusters'

echo '# back to the base'
cp golden.img base.img
t addcow reset vm.add-cow
t addcow compare -F raw vm.add-cow golden.img
t addcow check vm.add-cow
ls
