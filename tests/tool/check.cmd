# What check finds, what it repairs, and its exit codes.
sparse base.img 2M
addcow create -q -b base.img -F raw --cluster-size 64k disk.add-cow 1280k
echo '# all is well'
t addcow check disk.add-cow
t addcow check -q disk.add-cow
t addcow check --output=json disk.add-cow
t addcow check -q --output=json -U disk.add-cow
poke disk.add-cow 65536 '\017\000\010'
t addcow check disk.add-cow

echo '# bits behind the last of 20 clusters: in its byte, in the padding, behind the file'
poke disk.add-cow 65538 '\370\001'
poke disk.add-cow 131072 '\003'
refused_stdout() {
    state > ../before
    t "$@"
    state > ../after
    cmp ../before ../after || echo "SOMETHING CHANGED"
}
refused_stdout addcow check disk.add-cow
refused_stdout addcow check -q disk.add-cow
refused_stdout addcow check --output=json disk.add-cow
t addcow check --output=json -r leaks disk.add-cow
dump disk.add-cow 65536 8
t addcow check -r all disk.add-cow
poke disk.add-cow 70000 '\377'
t addcow check -r all disk.add-cow
dump disk.add-cow 65536 8

echo '# an image that has become shorter'
cp --sparse=always disk.add-cow short.add-cow
poke short.add-cow 84 'x'
cp --sparse=always disk.raw xisk.raw
truncate -s 64k xisk.raw
t addcow info --output=json short.add-cow | grep -E 'image-filename|clusters'
refused_stdout addcow check short.add-cow

echo '# a truncated bitmap is damage, truncated padding is not'
truncate -s 65538 disk.add-cow
refused_stdout addcow check disk.add-cow
refused_stdout addcow check -r all disk.add-cow
refused_stdout addcow check --output=json disk.add-cow
truncate -s 65539 disk.add-cow
t addcow check disk.add-cow
t addcow check -q disk.add-cow

echo '# a damaged header'
poke disk.add-cow 40 '\001'
refused_stdout addcow check disk.add-cow
refused_stdout addcow check -q disk.add-cow
refused_stdout addcow check --output=json -r all disk.add-cow
truncate -s 20 disk.add-cow
refused_stdout addcow check disk.add-cow

echo '# all allocated by the flag, not by the bits'
addcow create -q plain.add-cow 64k
t addcow check plain.add-cow
poke plain.add-cow 4096 '\001'
t addcow check plain.add-cow
t addcow check -q plain.add-cow
t addcow check --output=json plain.add-cow

echo '# names that are followed by other bytes are fine'
poke plain.add-cow 200 'extension'
t addcow check -q plain.add-cow

echo '# no add-cow file, or one of a version that we do not know'
head -c 100 /dev/zero > zero
refused addcow check zero
refused addcow check base.img
: > empty
refused addcow check empty
poke plain.add-cow 24 '\001'
refused addcow check plain.add-cow
addcow create -q base.add-cow 64k
addcow create -q -b base.add-cow -F add-cow over.add-cow
t addcow check -q over.add-cow
poke base.add-cow 24 '\001'
refused addcow check over.add-cow
poke base.add-cow 0 x
refused addcow check over.add-cow
refused addcow check base.add-cow
refused addcow check -r some disk.add-cow
refused addcow check missing.add-cow

echo '# nothing but add-cow files is checked, whatever the file is'
addcow create -q fine.add-cow 64k
t addcow check -q -f add-cow fine.add-cow
for format in raw qcow2 qed; do
    refused addcow check -f $format fine.add-cow
done
refused addcow check -f vmdk fine.add-cow
