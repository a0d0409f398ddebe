# A disk goes back to what its backing file shows, and its space is returned.
fill_clusters base.img 0 4
addcow create -q -b base.img -F raw --cluster-size 64k disk.add-cow
fill_clusters disk.raw 0 2
# Clusters 0 and 1, and stray bits.
poke disk.add-cow 65536 '\363'
t addcow map disk.add-cow
t addcow reset disk.add-cow
t addcow map disk.add-cow
t addcow check -q disk.add-cow
stat -c '%n %s takes %b blocks' disk.raw
t addcow reset -q disk.add-cow
lengths disk.add-cow disk.raw

echo '# without a backing file it is empty'
addcow create -q plain.add-cow 1M
fill_clusters plain.raw 2 1
t addcow reset plain.add-cow
t addcow map --output=json plain.add-cow
stat -c '%n %s takes %b blocks' plain.raw
t addcow info plain.add-cow --output=json | grep -e all-alloc -e compat

echo '# a file that has lost its end'
truncate -s 65536 disk.add-cow
refused addcow map disk.add-cow
t addcow reset disk.add-cow
t addcow check -q disk.add-cow

echo '# refused'
serve disk.add-cow
refused addcow reset disk.add-cow
unserve
serve disk.add-cow --read-only
refused addcow reset disk.add-cow
unserve
refused addcow reset
refused addcow reset base.img
refused addcow reset missing.add-cow
refused addcow reset --forse disk.add-cow
refused addcow reset -U disk.add-cow
refused addcow reset disk.add-cow plain.add-cow
# ALL_ALLOCATED with a backing file that could not be used.
addcow create -q odd.add-cow 1M
poke odd.add-cow 4 '\001'
t addcow check -q odd.add-cow
refused addcow reset odd.add-cow
