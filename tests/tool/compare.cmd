# Exit codes and words are those of qemu-img.
sparse a.img 1M
fill_clusters a.img 3 2
cp a.img b.img
t addcow compare -f raw -F raw a.img b.img
t addcow compare -f raw -F raw -s a.img b.img
t addcow compare -f raw -F raw -q a.img b.img
t addcow compare -f raw -F raw -p a.img b.img | tr '\r' '\n'

echo '# bytes'
poke b.img 200000 'a'
t addcow compare -f raw -F raw a.img b.img
t addcow compare -f raw -F raw b.img a.img
t addcow compare -f raw -F raw -q a.img b.img
poke b.img 1000000 'a'
poke b.img 700 'a'
t addcow compare -f raw -F raw a.img b.img

echo '# sizes'
sparse b.img 1048500
cp a.img b.img
truncate -s 1048500 b.img
t addcow compare -f raw -F raw -s a.img b.img
truncate -s 1048064 b.img
t addcow compare -f raw -F raw a.img b.img
t addcow compare -f raw -F raw b.img a.img
t addcow compare -f raw -F raw -s a.img b.img
truncate -s 3M b.img
t addcow compare -f raw -F raw a.img b.img
poke b.img 3000000 'behind'
t addcow compare -f raw -F raw a.img b.img
t addcow compare -f raw -F raw b.img a.img

echo '# what is stored, and what only reads as zeros'
cp a.img b.img
dd if=/dev/zero of=b.img bs=65536 seek=8 count=1 conv=notrunc status=none
t addcow compare -f raw -F raw a.img b.img
t addcow compare -f raw -F raw -s a.img b.img
poke b.img 400000 'a'
t addcow compare -f raw -F raw -s a.img b.img

echo '# disks'
addcow create -q -b a.img -F raw --cluster-size 64k disk.add-cow
t addcow compare -F raw disk.add-cow a.img
poke disk.add-cow 65536 '\004'
poke disk.raw 131072 'guest'
t addcow compare -F raw disk.add-cow a.img

echo '# those that cannot be compared'
refused addcow compare disk.add-cow nothing.add-cow
refused addcow compare nothing.add-cow disk.add-cow
refused addcow compare disk.add-cow a.img
refused addcow compare disk.add-cow
refused addcow compare -T none a.img b.img
serve disk.add-cow
refused addcow compare -F raw disk.add-cow a.img
t addcow compare -U -F raw disk.add-cow a.img
unserve
