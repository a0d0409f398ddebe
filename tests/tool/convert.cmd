# From everything that can be read to everything that can be made.
sparse base.img 1048676
fill_clusters base.img 0 3
fill_clusters base.img 5 1
dd if=/dev/zero of=base.img bs=65536 seek=1 count=1 conv=notrunc status=none
poke base.img 1048600 'end'
addcow create -q -b base.img -F raw --cluster-size 64k disk.add-cow 2049k
poke disk.add-cow 65536 '\302\000\000\200\001'
fill_clusters disk.raw 6 1
fill_clusters disk.raw 31 1

echo '# to raw: holes where there are zeros'
t addcow convert disk.add-cow flat.img
t addcow convert -p -f add-cow -O raw disk.add-cow flat2.img | tr '\r' '\n'
cmp flat.img flat2.img
lengths flat.img
t addcow map -f raw flat.img
t addcow compare -F raw disk.add-cow flat.img

echo '# a raw image that ends inside a sector'
t addcow convert -f raw base.img copy.img
lengths copy.img
t addcow compare -f raw -F raw base.img copy.img
t addcow map -f raw copy.img

echo '# all space taken, and holes of 128k at least'
t addcow convert -S 0 disk.add-cow full.img
t addcow map -f raw full.img
cmp full.img flat.img
t addcow convert -S 128k disk.add-cow coarse.img
t addcow map -f raw coarse.img
cmp coarse.img flat.img

echo '# to add-cow'
t addcow convert -O add-cow disk.add-cow new.add-cow
t addcow info new.add-cow | hide_sizes
cmp new.raw flat.img
t addcow check new.add-cow
t addcow convert -f raw -O add-cow -o cluster_size=64k,image_file=other.img base.img odd.add-cow
t addcow check odd.add-cow
cmp other.img copy.img

echo '# over a backing file: what differs from it'
t addcow convert -O add-cow -B base.img -F raw -o cluster_size=64k disk.add-cow over.add-cow
t addcow compare disk.add-cow over.add-cow
t addcow map over.add-cow
t addcow check over.add-cow
t addcow convert -O add-cow -o backing_file=over.add-cow,backing_fmt=add-cow disk.add-cow same.add-cow
t addcow check -q same.add-cow
addcow info same.add-cow | grep 'allocated clusters'

echo '# what is there is replaced only on request'
refused addcow convert disk.add-cow flat.img
refused addcow convert -O add-cow disk.add-cow new.add-cow
rm new.add-cow
refused addcow convert -O add-cow disk.add-cow new.add-cow
t addcow convert -O add-cow --force disk.add-cow new.add-cow
t addcow convert --force disk.add-cow full.img
cmp full.img flat.img
t addcow compare -F raw new.add-cow flat.img

echo '# what it takes with -o'
t addcow convert -o help

echo '# refused'
refused addcow convert --force disk.add-cow disk.raw
refused addcow convert --force disk.add-cow disk.add-cow
refused addcow convert --force disk.add-cow base.img
refused addcow convert --force -O add-cow -o image_file=base.img disk.add-cow new2.add-cow
refused addcow convert --force -O add-cow -o image_file=new3.add-cow disk.add-cow new3.add-cow
refused addcow convert -O add-cow -B base.img disk.add-cow new2.add-cow
refused addcow convert -O add-cow -B nothing.img -F raw disk.add-cow new2.add-cow
refused addcow convert -O qcow2 disk.add-cow new.qcow2
refused addcow convert -c disk.add-cow new.img
refused addcow convert -o cluster_size=64k disk.add-cow new.img
refused addcow convert -O add-cow -o size=1M disk.add-cow new2.add-cow
refused addcow convert -O add-cow -B base.img -o backing_file=base.img disk.add-cow new2.add-cow
refused addcow convert -O add-cow -o image_fmt=raw,image_fmt=raw disk.add-cow new2.add-cow
refused addcow convert -O add-cow -o sise=1M disk.add-cow new2.add-cow
refused addcow convert -O add-cow -o cluster=64k disk.add-cow new2.add-cow
refused addcow convert -S 1000 disk.add-cow new.img
refused addcow convert -S 32M disk.add-cow new.img
refused addcow convert disk.add-cow
refused addcow convert nothing.add-cow new.img
refused addcow convert disk.add-cow missing/new.img
refused addcow convert -f qcow2 disk.add-cow new.img
mkdir folder
refused addcow convert --force disk.add-cow folder
refused addcow convert -f raw /dev/null new.img
sparse empty.img 0
refused addcow convert -f raw -O add-cow empty.img new2.add-cow
t addcow convert -f raw empty.img none.img
lengths none.img
serve disk.add-cow
refused addcow convert disk.add-cow new.img
t addcow convert -U disk.add-cow new.img
unserve
serve new.raw --format raw
refused addcow convert --force disk.add-cow new.raw
unserve
ls -A
