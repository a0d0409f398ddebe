# What create refuses: one line each, nothing left behind, nothing changed.
sparse base.img 1M
mkdir folder
mkfifo fifo
ln -s base.img link.img
ln base.img hard.img
ln -s nowhere dangling
printf 'guest data' > old.raw
truncate -s 1M old.raw
addcow create -q -i old.raw old.add-cow
ln -s old.add-cow link.add-cow
ln old.add-cow hard.add-cow

echo '# size'
refused addcow create x.add-cow 0
refused addcow create x.add-cow 1000
refused addcow create x.add-cow 513b
refused addcow create x.add-cow 0.1k
refused addcow create x.add-cow 16E
refused addcow create x.add-cow 18446744073709551616
refused addcow create x.add-cow 8E
refused addcow create x.add-cow 9223372036854775808
refused addcow create x.add-cow 7E
refused addcow create --cluster-size 4k x.add-cow 1P
refused addcow create x.add-cow -1
refused addcow create x.add-cow -1G
refused addcow create x.add-cow 1X
refused addcow create x.add-cow ''
refused addcow create x.add-cow 1.5
refused addcow create x.add-cow
refused addcow create -o size=1M x.add-cow 1M
: > empty.img
refused addcow create -b empty.img -F raw x.add-cow

echo '# an image is never cut'
refused addcow create -i old.raw x.add-cow 512k
refused addcow create -i old.raw x.add-cow 1048064

echo '# backing file'
refused addcow create -b missing.img -F raw x.add-cow 1M
refused addcow create -b base.img x.add-cow 1M
refused addcow create -F raw x.add-cow 1M
refused addcow create -b base.img -F vmdk x.add-cow 1M
refused addcow create -b base.img -F '' x.add-cow 1M
refused addcow create -b folder -F raw x.add-cow 1M
refused addcow create -b fifo -F raw x.add-cow 1M
refused addcow create -b /dev/null -F raw x.add-cow 1M
refused addcow create -b '' -F raw x.add-cow 1M
refused addcow create -b nbd:localhost:10809 -F raw x.add-cow 1M
refused addcow create -b 'json:{"driver":"raw"}' -F raw x.add-cow 1M

echo '# image file'
refused addcow create -i folder x.add-cow 1M
refused addcow create -i fifo x.add-cow 1M
refused addcow create -i /dev/null x.add-cow 1M
refused addcow create -i nofolder/x.raw x.add-cow 1M
refused addcow create -i dangling x.add-cow 1M
refused addcow create -i '' x.add-cow 1M
refused addcow create -i x:y x.add-cow 1M
refused addcow create --image-format qcow2 x.add-cow 1M
refused addcow create old2.add-cow -i old.raw/ 1M
cp old.raw x.raw
refused addcow create x.add-cow
rm x.raw

echo '# one file in two roles'
refused addcow create -b base.img -F raw -i base.img x.add-cow 1M
refused addcow create -b base.img -F raw -i ./base.img x.add-cow 1M
refused addcow create -b base.img -F raw -i link.img x.add-cow 1M
refused addcow create -b base.img -F raw -i hard.img x.add-cow 1M
refused addcow create -i x.add-cow x.add-cow 1M
refused addcow create --force -i x.add-cow x.add-cow 1M
refused addcow create --force -i ./x.add-cow "$PWD/../work/x.add-cow" 1M
refused addcow create --force -i old.add-cow old.add-cow
refused addcow create --force -i hard.add-cow old.add-cow
refused addcow create --force -i link.add-cow old.add-cow
refused addcow create --force -b old.add-cow -F raw old.add-cow 1M
refused addcow create --force -b hard.add-cow -F raw old.add-cow 1M
refused addcow create --force -b base.img -F raw link.img 1M
refused addcow create --force x.raw 1M

echo '# the add-cow file'
refused addcow create -i new.raw old.add-cow 1M
refused addcow create -i new.raw dangling 1M
refused addcow create -i new.raw nofolder/x.add-cow 1M
refused addcow create -i new.raw folder 1M
refused addcow create -i new.raw fifo 1M
refused addcow create --force -i new.raw folder 1M
refused addcow create --force -i new.raw fifo 1M
refused addcow create --force -i new.raw dangling 1M
refused addcow create .. 1M
refused addcow create -i old.raw nofolder/x.add-cow 2M

echo '# cluster size'
refused addcow create --cluster-size 2k x.add-cow 1M
refused addcow create --cluster-size 4M x.add-cow 1M
refused addcow create --cluster-size 5000 x.add-cow 1M
refused addcow create --cluster-size 0 x.add-cow 1M
refused addcow create --cluster-size many x.add-cow 1M

echo '# options'
refused addcow create -o bakcing_file=base.img x.add-cow 1M
refused addcow create -o clustersize=4k x.add-cow 1M
refused addcow create -o compression_type=zstd x.add-cow 1M
refused addcow create -o size x.add-cow
refused addcow create -o size=1M, x.add-cow
refused addcow create -o cluster_size=4k --cluster-size 4k x.add-cow 1M
refused addcow create -o image_file=a.raw,image_file=b.raw x.add-cow 1M
refused addcow create -f qcow2 x.add-cow 1M
refused addcow create -o size=1M
refused addcow create
refused addcow create --forse x.add-cow 1M

echo '# no room for a file that large: an image that was there keeps its length'
(
    ulimit -f 4096
    trap '' XFSZ
    refused addcow create -i old.raw x.add-cow 64M
    refused addcow create -b base.img -F raw x.add-cow 64M
)
ls -A
