# What a disk holds itself gets into its base, which is shorter, longer, raw, add-cow.
sparse base.img 200000
fill_clusters base.img 0 3
addcow create -q -b base.img -F raw --cluster-size 64k disk.add-cow 640k
echo '# clusters 1 (data), 2 (a hole), 8 (data, behind the end of the base), 9 (a hole there)'
poke disk.add-cow 65536 '\006\003'
fill_clusters disk.raw 1 1
fill_clusters disk.raw 8 1
poke disk.raw 65536 'changed'
addcow convert -O raw disk.add-cow before.img

t addcow commit -d disk.add-cow
lengths base.img
cmp base.img before.img
addcow info disk.add-cow | grep 'allocated clusters'
t addcow compare -F raw disk.add-cow before.img

t addcow commit -p disk.add-cow | tr '\r' '\n'
cmp base.img before.img
addcow info disk.add-cow | grep 'allocated clusters'
t addcow compare -F raw disk.add-cow before.img
t addcow map disk.add-cow

echo '# a longer base keeps its end'
poke disk.add-cow 65536 '\001'
fill_clusters base.img 0 16
t addcow commit -q disk.add-cow
lengths base.img
t addcow map disk.add-cow

echo '# an add-cow base, which grows'
sparse bottom.img 1M
fill_clusters bottom.img 0 16
addcow create -q -b bottom.img -F raw --cluster-size 64k middle.add-cow 128k
addcow create -q -b middle.add-cow -F add-cow top.add-cow 512k
poke top.add-cow 4096 '\002\001\000\000\001'
fill_clusters top.raw 0 1
addcow convert -O raw top.add-cow top.img
cksum bottom.img > bottom.sum
t addcow commit top.add-cow
t addcow compare -F raw top.add-cow top.img
t addcow compare -F raw middle.add-cow top.img
t addcow map middle.add-cow
cksum bottom.img | cmp - bottom.sum

echo '# refused'
addcow create -q alone.add-cow 1M
refused addcow commit alone.add-cow
refused addcow commit nothing.add-cow
refused addcow commit base.img
poke disk.add-cow 65536 '\001'
serve disk.add-cow
refused addcow commit disk.add-cow
unserve
addcow create -q -b base.img -F raw second.add-cow
serve second.add-cow
refused addcow commit disk.add-cow
unserve
rm base.img
refused addcow commit disk.add-cow
ln disk.raw base.img
refused addcow commit disk.add-cow
