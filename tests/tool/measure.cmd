# A raw image counts with its whole length, as with qemu-img.
t addcow measure --size 6G
t addcow measure --output=json --size 6G
t addcow measure -O add-cow --output=json --size 6G
t addcow measure -O add-cow -o cluster_size=64k --size 6G
t addcow measure -O add-cow -o size=1.5k
t addcow measure --size 1000
sparse base.img 1000000
addcow create -q -b base.img -F raw disk.add-cow 2M
t addcow measure disk.add-cow
t addcow measure -f raw base.img
t addcow measure -f raw -O add-cow base.img

t addcow measure -o help

echo '# what it foretells'
addcow convert -O add-cow disk.add-cow new.add-cow
addcow measure -O add-cow disk.add-cow
lengths new.add-cow new.raw

echo '# refused'
refused addcow measure
refused addcow measure -O qcow2 --size 1G
refused addcow measure --size 1G disk.add-cow
refused addcow measure --size -1
refused addcow measure --size 10x
refused addcow measure -O add-cow --size 15E
refused addcow measure -o cluster_size=64k --size 1G
refused addcow measure -O add-cow -o cluster_size=1k --size 1G
for key in backing_file=base.img backing_fmt=raw image_file=a.img image_fmt=raw; do
    refused addcow measure -O add-cow -o $key --size 1G
done
refused addcow measure -O add-cow -o backing_fil=base.img --size 1G
refused addcow measure -o size=1G disk.add-cow
refused addcow measure -o size=1G --size 2G
refused addcow measure nothing.add-cow
