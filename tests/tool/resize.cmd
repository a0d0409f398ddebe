# Sizes: absolute, relative, the same; what is new reads zeros, what is gone stays gone.
fill_clusters base.img 0 40
addcow create -q -b base.img -F raw --cluster-size 64k disk.add-cow 1M
fill_clusters disk.raw 3 1
# Cluster 3.
poke disk.add-cow 65536 '\010'

echo '# larger, although the base has more: nothing of it shows'
t addcow resize disk.add-cow 2M
lengths disk.add-cow disk.raw
t addcow map disk.add-cow
t addcow check -q disk.add-cow
t addcow resize disk.add-cow +1M
t addcow resize -q disk.add-cow 3145728
lengths disk.add-cow disk.raw

echo '# from a size that is no whole cluster'
addcow create -q -b base.img -F raw --cluster-size 64k part.add-cow 100k
printf tail >> part.raw
t addcow resize part.add-cow 200k
t addcow map part.add-cow
dump part.raw 102400 16
t addcow check -q part.add-cow

echo '# smaller, and larger again'
t addcow resize --shrink disk.add-cow -2M
lengths disk.add-cow disk.raw
t addcow resize --shrink disk.add-cow 128k
t addcow resize disk.add-cow +128k
t addcow map disk.add-cow
t addcow check -q disk.add-cow

echo '# without a base, and a raw image'
addcow create -q plain.add-cow 1M
t addcow resize plain.add-cow 1G
t addcow check plain.add-cow
t addcow resize -f raw plain.raw +1G
t addcow info plain.add-cow --output=json | grep virtual
sparse odd.raw 1000
t addcow resize -f raw odd.raw 1k
lengths odd.raw

echo '# a raw image that ends inside a sector: its bytes are kept, and cut only on request'
head -c 65536 /dev/zero | tr '\0' x | head -c 700 > tail.raw
refused addcow resize -f raw tail.raw 512
refused addcow resize -f raw tail.raw +0
refused addcow resize -f raw tail.raw -188
t addcow resize -f raw tail.raw +324
lengths tail.raw
tr '\0' 0 < tail.raw | tail -c 330
echo
head -c 700 tail.raw > cut.raw
t addcow resize -f raw --shrink cut.raw 512
lengths cut.raw

echo '# refused: sizes'
refused addcow resize disk.add-cow 64k
refused addcow resize disk.add-cow -64k
refused addcow resize --shrink disk.add-cow 0
refused addcow resize --shrink disk.add-cow -256k
refused addcow resize --shrink disk.add-cow -1G
refused addcow resize disk.add-cow 1000
refused addcow resize disk.add-cow 1Q
refused addcow resize disk.add-cow +
refused addcow resize disk.add-cow -
refused addcow resize disk.add-cow --1M
refused addcow resize disk.add-cow ''
refused addcow resize disk.add-cow +16E
refused addcow resize disk.add-cow 7E
refused addcow resize -f raw disk.raw 100
refused addcow resize -f raw --shrink disk.raw 0

echo '# refused: options'
refused addcow resize --shrnk disk.add-cow 64k
refused addcow resize disk.add-cow --shrnk 64k
refused addcow resize disk.add-cow
refused addcow resize
refused addcow resize missing.add-cow 1M
refused addcow resize base.img 1M
refused addcow resize -f qcow3 disk.add-cow 1M

echo '# refused: in use, read-only, no base, truncated, no room'
serve disk.add-cow
refused addcow resize disk.add-cow 1M
refused addcow resize -f raw disk.raw 1M
unserve
addcow create -q -b gone.img -F raw gone.add-cow 1M 2> ../error || sparse gone.img 1M
addcow create -q -b gone.img -F raw gone.add-cow 1M
rm gone.img
refused addcow resize gone.add-cow 2M
t addcow resize --shrink gone.add-cow 512k
cp part.add-cow short.add-cow
truncate -s 65536 short.add-cow
refused addcow resize short.add-cow 1M
(
    ulimit -f 8192
    trap '' XFSZ
    t addcow resize disk.add-cow 64M
)
t addcow check -q disk.add-cow
lengths disk.add-cow disk.raw
