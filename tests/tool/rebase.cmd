# Another backing file for a disk.
fill_clusters base.img 0 4
cp base.img same.img
cp base.img other.img
poke other.img 70000 other
addcow create -q -b base.img -F raw --cluster-size 64k disk.add-cow 300k
view() {
    addcow map --output=json disk.add-cow
}
view

echo '# the same bytes: only the name changes'
t addcow rebase -b same.img -F raw disk.add-cow
view

echo '# one cluster differs'
t addcow rebase -p -b other.img -F raw disk.add-cow | tr '\r' '\n'
view
t addcow check -q disk.add-cow

echo '# a shorter one, a longer one, an overlay'
truncate -s 100k same.img
t addcow rebase -b same.img -F raw disk.add-cow
view
echo '# what was zeros behind the end of the old one stays zeros'
fill_clusters long.img 0 10
t addcow rebase -b long.img -F raw disk.add-cow
view
addcow create -q -b other.img -F raw middle.add-cow
t addcow rebase -b middle.add-cow -F add-cow disk.add-cow
view
t addcow rebase -b "$PWD/other.img" -F raw disk.add-cow
t addcow info disk.add-cow --output=json | grep backing

echo '# none'
t addcow rebase -b '' disk.add-cow
view
t addcow rebase -b '' disk.add-cow
addcow info disk.add-cow | grep backing || echo no backing file

echo '# the name only'
addcow create -q -b base.img -F raw --cluster-size 64k name.add-cow 300k
t addcow rebase -u -b nowhere/gone.img -F raw name.add-cow
t addcow info name.add-cow --output=json | grep backing
refused addcow map name.add-cow
refused addcow rebase -b base.img -F raw name.add-cow
t addcow rebase --unsafe -b base.img -F raw name.add-cow
t addcow check -q name.add-cow
dump name.add-cow 76 32

echo '# a disk that is complete'
addcow create -q whole.add-cow 1M
t addcow rebase -b base.img -F raw whole.add-cow
t addcow info whole.add-cow --output=json | grep -e backing -e all-allocated

echo '# refused'
refused addcow rebase -b base.img disk.add-cow
refused addcow rebase -F raw disk.add-cow
refused addcow rebase disk.add-cow
refused addcow rebase -b '' -F raw disk.add-cow
refused addcow rebase -b base.img -F vmdk disk.add-cow
refused addcow rebase -u -b base.img -F vmdk disk.add-cow
refused addcow rebase -b missing.img -F raw disk.add-cow
refused addcow rebase -b nbd:x -F raw disk.add-cow
refused addcow rebase -b 'json:{}' -F raw disk.add-cow
refused addcow rebase -b disk.raw -F raw disk.add-cow
refused addcow rebase -b disk.add-cow -F add-cow disk.add-cow
refused addcow rebase -u -b ./disk.add-cow -F add-cow disk.add-cow
ln disk.raw hard.raw
refused addcow rebase -u -b hard.raw -F raw disk.add-cow
addcow create -q -b disk.add-cow -F add-cow upper.add-cow
refused addcow rebase -b upper.add-cow -F add-cow disk.add-cow
refused addcow rebase -b base.img -F raw missing.add-cow
refused addcow rebase -b base.img -F raw base.img
refused addcow rebase --bakcing base.img -F raw disk.add-cow
long=$(printf 'x%.0s' $(seq 1100))
refused addcow rebase -u -b "$long" -F raw disk.add-cow > ../long || true
sed "s/$long/LONG/g" ../long
serve disk.add-cow
refused addcow rebase -b base.img -F raw disk.add-cow
refused addcow rebase -u -b base.img -F raw disk.add-cow
unserve
serve base.img --format raw
refused addcow rebase -b base.img -F raw disk.add-cow
unserve
