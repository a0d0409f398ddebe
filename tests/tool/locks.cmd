# What is said about a disk in use. Who is refused when is in tests/locks.rs.
sparse base.img 1M
addcow create -q -b base.img -F raw disk.add-cow
addcow create -q -b base.img -F raw other.add-cow

echo '# served'
serve disk.add-cow
refused addcow info disk.add-cow
refused addcow map disk.add-cow
refused addcow check disk.add-cow
refused addcow info -f raw disk.raw
refused addcow check -r all disk.add-cow
refused addcow check -U -r all disk.add-cow
refused addcow create --force disk.add-cow 1M
refused addcow create --force -i new.raw disk.add-cow 1M
refused addcow create -i disk.raw new.add-cow
refused addcowd --blk-file disk.add-cow --socket-path second
t addcow map -U disk.add-cow
t addcow check -q -U disk.add-cow

echo '# the base is shared'
t addcow check -q other.add-cow
t addcow info -f raw base.img | head -1
refused addcowd --format raw --blk-file base.img --socket-path second
unserve

echo '# not served any more'
t addcow check -q -r all disk.add-cow

echo '# the base is written to'
serve base.img --format raw
refused addcow map other.add-cow
refused addcow create -b base.img -F raw new.add-cow
refused addcowd --blk-file other.add-cow --socket-path second
unserve
ls -A
