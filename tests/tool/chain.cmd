# Chains of overlays: what is followed, what is refused, and what info and map show of it.
info() {
    echo "\$ addcow info $*"
    addcow info "$@" | hide_sizes
}
sparse base.img 1M
fill_clusters base.img 0 12
mkdir sub
t addcow create -q -b ../base.img -F raw --cluster-size 64k sub/middle.add-cow 640k
poke sub/middle.add-cow 65536 '\006'
fill_clusters sub/middle.raw 1 2
t addcow create -b sub/middle.add-cow -F add-cow --cluster-size 64k top.add-cow 2M
poke top.add-cow 65536 '\004'
fill_clusters top.raw 2 1
info --backing-chain top.add-cow
info --backing-chain --output=json top.add-cow
t addcow map top.add-cow
t addcow map --output=json top.add-cow
t addcow check top.add-cow

echo '# the size of a new disk is that of its chain'
addcow create -q -b sub/middle.add-cow -F add-cow same.add-cow
lengths same.raw

echo '# a chain that comes back'
addcow create -q plain.add-cow 640k
ln -s plain.add-cow link.add-cow
rm sub/middle.add-cow
addcow create -q -b ../link.add-cow -F add-cow -i middle.raw sub/middle.add-cow 640k
ln -sf top.add-cow link.add-cow
refused addcow map top.add-cow
refused addcow map -f raw --output=json missing.img
refused addcow info --backing-chain top.add-cow
refused addcow check top.add-cow
info top.add-cow | head -2
refused addcow create -b top.add-cow -F add-cow x.add-cow 1M

echo '# one file twice'
rm sub/middle.add-cow
ln -s base.img link.img
addcow create -q -b ../link.img -F raw -i middle.raw sub/middle.add-cow 640k
refused addcow create -b top.add-cow -F add-cow -i sub/middle.raw x.add-cow 1M
refused addcow create -b top.add-cow -F add-cow -i base.img x.add-cow 1M
refused addcow create -b ../top.add-cow -F add-cow --force sub/middle.add-cow 1M
ln -sf top.raw link.img
refused addcow map top.add-cow

echo '# a middle layer that is damaged, or not there'
poke sub/middle.add-cow 0 'X'
refused addcow map top.add-cow
rm sub/middle.raw
refused addcow map top.add-cow
rm sub/middle.add-cow
refused addcow map top.add-cow
refused addcow check top.add-cow

echo '# too deep'
addcow create -q -b base.img -F raw 2.add-cow 1M
for depth in $(seq 3 64); do
    addcow create -q -b "$((depth - 1)).add-cow" -F add-cow "$depth.add-cow" 1M
done
t addcow map 64.add-cow
refused addcow create -q -b 64.add-cow -F add-cow 65.add-cow 1M
sed 's/63.add-cow/64.add-cow/' 64.add-cow > 65.add-cow
sed -i 's/64.raw/2B.raw/' 65.add-cow
sparse 2B.raw 1M
refused addcow map 65.add-cow
