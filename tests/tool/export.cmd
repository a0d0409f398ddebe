# A disk of clusters of 64 KiB over a base; clusters 1, 2 and 9 are allocated.
sparse base.img 1M
fill_clusters base.img 0 3
addcow create -q -b base.img -F raw --cluster-size 64k disk.add-cow 2M
fill_clusters disk.raw 1 2
fill_clusters disk.raw 9 1
poke disk.add-cow 65536 '\006\002'
t addcow export disk.add-cow disk.qcow2
dump disk.qcow2 196608 8
dump disk.qcow2 262144 96
lengths disk.qcow2 disk.raw
t addcow map -f qcow2 disk.qcow2
t addcow map disk.add-cow

echo '# the same file again'
refused addcow export disk.add-cow disk.qcow2
t addcow export -q --force --relative disk.add-cow disk.qcow2
dump disk.qcow2 0 192

echo '# without a backing file all of it is in the raw image'
addcow create -q full.add-cow 1M
t addcow export -p full.add-cow full.qcow2
lengths full.qcow2

echo '# another folder: the backing name becomes absolute'
mkdir sub
t addcow export disk.add-cow sub/out.qcow2

echo '# what cannot be'
refused addcow export --relative disk.add-cow sub/other.qcow2
refused addcow export disk.add-cow missing/other.qcow2
refused addcow export disk.raw other.qcow2
refused addcow export missing.add-cow other.qcow2
refused addcow export --force disk.add-cow disk.add-cow
refused addcow export --force disk.add-cow disk.raw
refused addcow export --force disk.add-cow base.img
refused addcow export --force disk.add-cow sub
ln -s base.img link.qcow2
refused addcow export --force disk.add-cow link.qcow2
addcow create -q -b disk.add-cow -F add-cow top.add-cow
refused addcow export top.add-cow other.qcow2
refused addcow export disk.add-cow
