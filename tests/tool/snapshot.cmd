# A new overlay on a disk.
fill_clusters base.img 0 4
addcow create -q -b base.img -F raw --cluster-size 64k disk.add-cow 300k
t addcow snapshot disk.add-cow top.add-cow
t addcow info --backing-chain top.add-cow | hide_sizes
t addcow snapshot -q -i more.img top.add-cow third.add-cow
t addcow map third.add-cow

echo '# in another folder, and with names that need care'
mkdir sub
t addcow snapshot disk.add-cow sub/top.add-cow
t addcow map sub/top.add-cow
cd sub
t addcow snapshot ../disk.add-cow other.add-cow
t addcow snapshot "$PWD/top.add-cow" same.add-cow
cd ..
t addcow snapshot sub/../top.add-cow ./four.add-cow
addcow create -q a:b.add-cow 64k
t addcow snapshot a:b.add-cow c:d.add-cow
t addcow map --output=json c:d.add-cow

echo '# what it stands on is not written to while it is in use'
serve top.add-cow
refused addcow resize disk.add-cow 1M
refused addcow snapshot top.add-cow new.add-cow
t addcow snapshot -q disk.add-cow second.add-cow
unserve

echo '# refused'
refused addcow snapshot disk.add-cow top.add-cow
refused addcow snapshot disk.add-cow disk.add-cow
refused addcow snapshot --force disk.add-cow disk.add-cow
refused addcow snapshot -i disk.raw disk.add-cow new.add-cow
refused addcow snapshot -i base.img disk.add-cow new.add-cow
refused addcow snapshot -i top.raw disk.add-cow disk2.add-cow --force --force
refused addcow snapshot disk.add-cow
refused addcow snapshot missing.add-cow new.add-cow
refused addcow snapshot base.img new.add-cow
refused addcow snapshot disk.add-cow nofolder/new.add-cow
refused addcow snapshot -l disk.add-cow
refused addcow snapshot --imgae x disk.add-cow new.add-cow
t addcow snapshot -q --force disk.add-cow top.add-cow
ls -A . sub
