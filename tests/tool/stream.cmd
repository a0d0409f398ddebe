# A disk whose image file is full of what the guest has never seen; data, holes and zeros below it.
sparse base.img 1048676
fill_clusters base.img 0 3
fill_clusters base.img 5 1
dd if=/dev/zero of=base.img bs=65536 seek=1 count=1 conv=notrunc status=none
poke base.img 1048600 'end'
fill_clusters disk.raw 0 32
truncate -s 2049k disk.raw
addcow create -q -b base.img -F raw -i disk.raw --cluster-size 64k disk.add-cow
poke disk.add-cow 65536 '\302\000\000\200'
addcow convert -O raw disk.add-cow before.img

t addcow stream disk.add-cow
cmp before.img disk.raw
addcow info disk.add-cow | grep allocated
t addcow check disk.add-cow
t addcow compare -F raw disk.add-cow before.img
t addcow map disk.add-cow

echo '# what was zeros takes no space: 4 clusters and the last bytes of the base do, and of disk.raw'
echo '# clusters 1, 6, 7 and 31, which were allocated'
t addcow map -f raw disk.raw

echo '# the backing file is not needed any more, and nothing is left to do'
rm base.img
t addcow stream -p disk.add-cow | tr '\r' '\n'
cmp before.img disk.raw

echo '# chains'
sparse base.img 1M
fill_clusters base.img 0 4
addcow create -q -b base.img -F raw --cluster-size 64k middle.add-cow 640k
poke middle.add-cow 65536 '\004'
addcow create -q -b middle.add-cow -F add-cow top.add-cow 1M
t addcow stream -p top.add-cow | tr '\r' '\n'
t addcow map -f raw top.raw

echo '# refused'
addcow create -q -b base.img -F raw other.add-cow
rm base.img
refused addcow stream other.add-cow
refused addcow stream top.raw
refused addcow stream nothing.add-cow
sparse base.img 1M
serve other.add-cow
refused addcow stream other.add-cow
unserve
