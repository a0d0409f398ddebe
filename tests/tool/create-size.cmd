# Where a disk's size and cluster size come from.
echo '# from the backing file, rounded up'
sparse base.img 1000000
t addcow create -b base.img -F raw a.add-cow
lengths a.raw

echo '# from an existing image, which keeps its length and its content'
printf 'some bytes' > b.raw
truncate -s 1000000 b.raw
t addcow create -i b.raw b.add-cow
lengths b.raw
t addcow create -i b.raw -b base.img -F raw --force b.add-cow
lengths b.raw
t addcow create -i b.raw b2.add-cow 999936
lengths b.raw
head -c 10 b.raw; echo

echo '# an image that is too short grows, an empty one too'
t addcow create -i b.raw b3.add-cow 2M
lengths b.raw
head -c 10 b.raw; echo
: > c.raw
t addcow create -i c.raw -b base.img -F raw c.add-cow
lengths c.raw

echo '# without a backing file every cluster is allocated: the flag and the bits'
t addcow create d.add-cow 45056
dump d.add-cow 32 8
dump d.add-cow 4096 16
lengths d.add-cow
t addcow check d.add-cow

echo '# default cluster sizes; all bits 0, so the files take no space'
sparse base.img 1M
t addcow create -b base.img -F raw e1.add-cow 512
t addcow create -b base.img -F raw e2.add-cow 1T
t addcow create -b base.img -F raw e3.add-cow 1025G
t addcow create -b base.img -F raw e4.add-cow 3T
t addcow create -b base.img -F raw --cluster-size 2M e5.add-cow 1.5G
t addcow create -b base.img -F raw --cluster-size 4096b e6.add-cow 0x100000
lengths e?.add-cow
for file in e?.add-cow; do
    test "$(stat -c %b "$file")" -le 64 || echo "$file is not sparse"
done

echo '# replaced, the image used again'
t addcow create --force -b base.img -F raw e1.add-cow
ls -A
