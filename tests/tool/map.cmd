# Where the bytes of a disk are: a backing file with holes, shorter than the disk; clusters with
# data and without; a last cluster that is not whole.
sparse base.img 1048676
fill_clusters base.img 0 3
fill_clusters base.img 5 1
poke base.img 1048600 'end'
addcow create -q -b base.img -F raw --cluster-size 64k disk.add-cow 2049k
t addcow map --output=json disk.add-cow
t addcow map disk.add-cow

echo '# clusters 1, 6, 7, 31 and 32 allocated; 7 and 32 are holes in the image, and 2 is data that
# means nothing'
poke disk.add-cow 65536 '\302\000\000\200\001'
fill_clusters disk.raw 1 2
fill_clusters disk.raw 6 1
fill_clusters disk.raw 31 1
t addcow map --output=json disk.add-cow
t addcow map disk.add-cow

echo '# a part of it'
t addcow map --output=json --start-offset 100 --max-length 70000 disk.add-cow
t addcow map --output=json --start-offset 2M disk.add-cow
t addcow map --output=json --start-offset 4M disk.add-cow
t addcow map --output=json --max-length 0 disk.add-cow
t addcow map --start-offset 4M disk.add-cow
t addcow map -U --start-offset 0x60000 --max-length 16E disk.add-cow
t addcow map -U --start-offset 0x60000 --max-length 15E disk.add-cow

echo '# no backing file'
addcow create -q plain.add-cow 1M
fill_clusters plain.raw 3 1
t addcow map --output=json plain.add-cow
t addcow map plain.add-cow

echo '# a raw image'
t addcow map -f raw --output=json plain.raw
t addcow map -f raw plain.raw

echo '# a reader that goes away is no error'
addcow map --output=json disk.add-cow | true
