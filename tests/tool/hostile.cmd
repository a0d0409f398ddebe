# Headers and files that must be refused by every verb, with one line that says why.
sparse base.img 1M
addcow create -q -b base.img -F raw good.add-cow 1M
all() {
    for verb in info check map; do
        refused addcow $verb "$@"
    done
}
bad() {
    echo "# $1"
    cp good.add-cow bad.add-cow
}

bad 'wrong magic'
poke bad.add-cow 0 'QFI\373'
all bad.add-cow
bad 'old magic'
poke bad.add-cow 0 'ADD_COW\377'
all bad.add-cow
bad 'unknown feature bits'
poke bad.add-cow 24 '\004'
poke bad.add-cow 31 '\200'
all bad.add-cow

for length in 0 3 50 80 100; do
    bad "cut after $length bytes"
    truncate -s $length bad.add-cow
    refused addcow info bad.add-cow
done
bad 'cut inside the bitmap'
truncate -s 4120 bad.add-cow
refused addcow info bad.add-cow
refused addcow map bad.add-cow

bad 'header_size too small'
poke bad.add-cow 40 '\000\002\000\000'
refused addcow info bad.add-cow
bad 'header_size too large'
poke bad.add-cow 40 '\377\377\377\377'
refused addcow info bad.add-cow
bad 'cluster_bits too small'
poke bad.add-cow 20 '\010'
refused addcow info bad.add-cow
bad 'cluster_bits too large'
poke bad.add-cow 20 '\100'
refused addcow info bad.add-cow
bad 'backing name in the fixed header'
poke bad.add-cow 4 '\010'
refused addcow info bad.add-cow
bad 'backing name past the header'
poke bad.add-cow 4 '\376\017'
refused addcow info bad.add-cow
bad 'backing name offset out of range'
poke bad.add-cow 4 '\377\377\377\377'
refused addcow info bad.add-cow
bad 'backing name size without offset'
poke bad.add-cow 4 '\000'
refused addcow info bad.add-cow
bad 'backing name too long'
poke bad.add-cow 8 '\000\004'
refused addcow info bad.add-cow
bad 'image name missing'
poke bad.add-cow 16 '\000'
refused addcow info bad.add-cow
bad 'image name offset out of range'
poke bad.add-cow 12 '\000\020'
refused addcow info bad.add-cow
bad 'names overlap'
poke bad.add-cow 12 '\117'
refused addcow info bad.add-cow
bad 'a NUL in a name'
poke bad.add-cow 78 '\000'
refused addcow info bad.add-cow
bad 'a protocol as a name'
poke bad.add-cow 76 'nbd:h:80'
refused addcow info bad.add-cow
bad 'a name that would play with the terminal'
poke bad.add-cow 76 'b\033[2J\n'
refused addcow map bad.add-cow
bad 'unknown backing format'
poke bad.add-cow 44 'vmdk'
refused addcow map bad.add-cow
refused addcow check bad.add-cow
bad 'no backing format'
poke bad.add-cow 44 '\000\000\000'
refused addcow info bad.add-cow
bad 'no text in a format'
poke bad.add-cow 60 '\033\n'
refused addcow info bad.add-cow
bad 'unknown image format'
poke bad.add-cow 60 'qcow2'
refused addcow info bad.add-cow

echo '# image missing'
mv good.raw away.raw
all good.add-cow
echo '# a folder or a FIFO as image'
mkdir good.raw
all good.add-cow
rmdir good.raw
mkfifo good.raw
all good.add-cow
rm good.raw
echo '# no sector in the image'
truncate -s 511 good.raw
all good.add-cow
rm good.raw
echo '# the add-cow file as image'
ln -s good.add-cow good.raw
all good.add-cow
rm good.raw
ln good.add-cow good.raw
refused addcow info good.add-cow
rm good.raw
echo '# the backing file as image'
ln -s base.img good.raw
refused addcow map good.add-cow
refused addcow check good.add-cow
refused addcow info --backing-chain good.add-cow
rm good.raw
ln base.img good.raw
refused addcow map good.add-cow
rm good.raw
mv away.raw good.raw
echo '# the add-cow file as backing file'
mv base.img away.img
ln good.add-cow base.img
refused addcow map good.add-cow
refused addcow check good.add-cow
rm base.img
echo '# a folder or a FIFO as backing file'
mkdir base.img
refused addcow map good.add-cow
rmdir base.img
mkfifo base.img
refused addcow map good.add-cow
rm base.img
echo '# backing file missing'
refused addcow map good.add-cow
refused addcow check good.add-cow
refused addcow info --backing-chain good.add-cow
mv away.img base.img

echo '# the disk itself'
mkfifo fifo
all missing.add-cow
all .
all fifo
refused addcow info good.raw
refused addcow check good.raw
refused addcow check -f raw good.raw

echo '# and the disk is as good as before'
t addcow check good.add-cow
