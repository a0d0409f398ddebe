# A disk of clusters of 64 KiB over a base; clusters 1, 2 and 9 are allocated.
sparse base.img 1M
fill_clusters base.img 0 3
addcow create -q -b base.img -F raw -i disk.raw --cluster-size 64k first.add-cow 2M
fill_clusters disk.raw 1 2
fill_clusters disk.raw 9 1
poke first.add-cow 65536 '\006\002'
addcow export -q first.add-cow disk.qcow2
t addcow adopt disk.qcow2
t addcow map disk.add-cow
t addcow check disk.add-cow
cmp first.add-cow disk.add-cow && echo the same file

echo '# zero clusters (3 with a place, 4 without): what the raw image holds there goes'
fill_clusters disk.raw 3 2
fill_clusters disk.raw 6 1
poke disk.qcow2 262168 '\200\000\000\000\000\003\000\001'
poke disk.qcow2 262176 '\000\000\000\000\000\000\000\001'
t addcow adopt -p --force disk.qcow2
t addcow map disk.add-cow
dump disk.raw 196608 131072
dump disk.raw 393216 16

echo '# other names'
t addcow adopt disk.qcow2 other.add-cow
mkdir sub
t addcow adopt disk.qcow2 sub/disk.add-cow
mv disk.raw moved.raw
refused addcow adopt --force disk.qcow2
t addcow adopt --force --data-file moved.raw disk.qcow2
mv moved.raw disk.raw
addcow adopt -q --force disk.qcow2

echo '# without a folder, the name of the data file means two files'
addcow export -q --force --relative disk.add-cow sub/../disk.qcow2
(
    cd sub
    t addcow adopt ../disk.qcow2 new.add-cow
    sparse disk.raw 2M
    refused addcow adopt ../disk.qcow2 another.add-cow
    t addcow adopt --data-file ../disk.raw ../disk.qcow2 another.add-cow
)

echo '# no backing file: all of it is in the raw image, which is zeroed where nothing was'
addcow create -q -b base.img -F raw --cluster-size 64k plain.add-cow 1M
fill_clusters plain.raw 0 16
poke plain.add-cow 65536 '\001'
addcow export -q plain.add-cow plain.qcow2
poke plain.qcow2 8 '\000\000\000\000\000\000\000\000'
t addcow adopt --force plain.qcow2
t addcow map --output json plain.add-cow

echo '# the data file is longer by a part of a cluster, as QEMU makes it, or too long'
addcow create -q -b base.img -F raw --cluster-size 64k odd.add-cow 1000k
addcow export -q odd.add-cow odd.qcow2
sparse odd.raw 1M
t addcow adopt --force odd.qcow2
lengths odd.raw
sparse odd.raw 1025k
refused addcow adopt --force odd.qcow2
sparse odd.raw 100k
t addcow adopt --force odd.qcow2
lengths odd.raw

echo '# what cannot be adopted'
# bad OFFSET BYTES: the same disk with other bytes there.
bad() {
    cp disk.qcow2 bad.qcow2
    poke bad.qcow2 "$@"
    refused addcow adopt bad.qcow2
}
addcow export -q --force disk.add-cow disk.qcow2
refused addcow adopt disk.qcow2
refused addcow adopt missing.qcow2
refused addcow adopt disk.raw new.add-cow
refused addcow adopt disk.qcow2 missing/new.add-cow
refused addcow adopt --force disk.qcow2 disk.raw
refused addcow adopt --force disk.qcow2 disk.qcow2
refused addcow adopt --force disk.qcow2 base.img
refused addcow adopt --data-file base.img disk.qcow2 new.add-cow
refused addcow adopt --data-file disk.qcow2 disk.qcow2 new.add-cow
echo '# dirty, corrupt, no data file, zstd, extended L2 entries, an unknown feature'
bad 79 '\005'
bad 79 '\006'
bad 79 '\000'
bad 79 '\014'
bad 79 '\024'
bad 72 '\200'
echo '# LUKS, a snapshot, no disk, version 2'
bad 35 '\002'
bad 63 '\001'
bad 24 '\000\000\000\000\000\000\000\000'
bad 7 '\002'
echo '# the backing format and the data file are not named'
bad 112 '\001\002\003\004'
bad 128 '\001\002\003\004'
echo '# L1: a table past the end, in use twice, not in use, on the header; reserved bits'
bad 196613 '\100'
bad 196612 '\000\003\000\000'
bad 196608 '\000'
bad 196608 '\201'
bad 40 '\000\000\000\000\000\000\000\000'
echo '# L2: another place, not in use, compressed, reserved bits, in the middle of a cluster'
bad 262157 '\002'
bad 262152 '\000'
bad 262152 '\300'
bad 262159 '\002'
bad 262158 '\002'
echo '# refcounts: of the header, of an L2 table'
bad 131073 '\002'
bad 131081 '\000'
ls -A | grep '^[.]' || echo 'no temporary files'
