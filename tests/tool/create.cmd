# The example of docs/format.md, byte for byte.
sparse ubuntu.img 2G
t addcow create -b ubuntu.img -F raw -i test.raw -o cluster_size=65536 test.add-cow 8G
dump test.add-cow 0 112
lengths test.add-cow test.raw
stat -c '%n takes %b blocks' test.raw
test "$(stat -c %a test.add-cow)" = "$(stat -c %a test.raw)" && echo same permissions

echo '# the same by other words'
t addcow create -f add-cow --backing ubuntu.img --backing-format raw --image b.raw \
    --image-format raw --cluster-size 64K b.add-cow 8589934592
t addcow create -o size=8G,backing_file=ubuntu.img,backing_fmt=raw \
    -o image_file=c.raw,image_fmt=raw,cluster_size=0x10000 c.add-cow
cmp -s b.add-cow test.add-cow || echo 'the image file has another name'
cmp -s b.add-cow c.add-cow || echo 'the image file has another name'

echo '# nothing printed'
t addcow create -q -b ubuntu.img -F raw q.add-cow 1M
lengths q.add-cow q.raw

echo '# names are relative to the folder of the disk'
mkdir sub
sparse sub/base.img 3M
t addcow create -b base.img -F raw sub/disk.add-cow
lengths sub/disk.add-cow sub/disk.raw
t addcow create -b ../ubuntu.img -F raw -i "$PWD/absolute.raw" -q sub/other.add-cow 1M
lengths sub/other.add-cow absolute.raw

echo '# names that look like a protocol, and bytes that no terminal should see'
t addcow create a:b.add-cow 1M
escape=$(printf 'e\033[1m.add-cow')
addcow create "$escape" 1M

echo '# the names of the options'
t addcow create -o help
t addcow create -o '?' disk.add-cow
ls -Ab
