# What info shows. How much space files take depends on the file system, and is hidden.
info() {
    echo "\$ addcow info $*"
    addcow info "$@" | hide_sizes
}
sparse base.img 2M
addcow create -q -b base.img -F raw -i data.raw --cluster-size 64k disk.add-cow 8G
poke disk.add-cow 65536 '\003\200'
info disk.add-cow
info --output=json disk.add-cow
info --backing-chain disk.add-cow
info --backing-chain --output json disk.add-cow

echo '# from another folder: where the names lead to'
mkdir sub
cd sub
info -U ../disk.add-cow
cd ..

echo '# without its backing file'
mv base.img away.img
info disk.add-cow
mv away.img base.img

echo '# no backing file: all allocated'
addcow create -q plain.add-cow 1M
info plain.add-cow
info --output=json plain.add-cow
info --backing-chain --output=json plain.add-cow

echo '# an unknown compatible feature'
poke plain.add-cow 32 '\021'
info plain.add-cow

echo '# names that must not reach a terminal as they are'
name=$(printf 'e\033[1m\nvil')
addcow create -q -i "$name" evil.add-cow 1M
info evil.add-cow
info --output=json evil.add-cow

echo '# a raw image is one only if we are told so'
refused addcow info data.raw
truncate -s 1000 small.raw
info -f raw small.raw
info -f raw --output=json --backing-chain small.raw
