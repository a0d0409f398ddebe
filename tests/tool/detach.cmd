# The raw image becomes the disk.
fill_clusters base.img 0 4
addcow create -q plain.add-cow 1M
t addcow detach plain.add-cow
ls -A
addcow create -q -b base.img -F raw --cluster-size 64k disk.add-cow
cp base.img disk.raw
# Four clusters of four, without the flag. The base is not needed any more.
poke disk.add-cow 65536 '\017'
mv base.img gone.img
t addcow detach -q disk.add-cow
ls -A
cmp disk.raw gone.img
mv gone.img base.img

echo '# refused'
addcow create -q -b base.img -F raw -i part.raw --cluster-size 64k part.add-cow
poke part.add-cow 65536 '\015'
refused addcow detach part.add-cow
poke part.add-cow 65536 '\037'
refused addcow detach part.add-cow
poke part.add-cow 65536 '\017'
truncate -s 65536 part.add-cow
refused addcow detach part.add-cow
addcow create -q whole.add-cow 1M
ln -s whole.add-cow link.add-cow
refused addcow detach link.add-cow
serve whole.add-cow
refused addcow detach whole.add-cow
unserve
refused addcow detach
refused addcow detach base.img
refused addcow detach missing.add-cow
refused addcow detach --quite whole.add-cow
t addcow detach whole.add-cow
ls -A
