# shellcheck shell=bash
# Makes what a guest boots from: a Debian root image, its kernel, and a tiny initrd.
#
# Relies on common.sh and packages.sh, on root, and on the network when nothing is cached. The
# result lies in $image_dir and is kept; it is made again when a file that it is made from changes.
# ADDCOW_MIRROR names another Debian mirror.
#
# Mounts nothing of its own on this machine: the file system is filled by mke2fs from a folder.

image_dir=${ADDCOW_CACHE_DIR:-$repo/target}/guest-image
image_suite=bookworm
image_size=512M
# The kernel has ext4 built in, and the disk's drivers as modules. The order is the load order.
image_modules=(virtio/virtio_ring virtio/virtio virtio/virtio_pci_legacy_dev
    virtio/virtio_pci_modern_dev virtio/virtio_pci block/virtio_blk)

# What the image is made from, as one checksum.
image_recipe() {
    cat "$repo/scripts/lib/guest-image.sh" "$repo/scripts/lib/guest-init" \
        "$repo/scripts/lib/initrd-init" | sha256sum | cut -d' ' -f1
}

# Makes $image_dir/{base.raw,vmlinuz,initrd} unless they are there already.
make_guest_image() {
    local root
    if [ "$(cat "$image_dir/recipe" 2>/dev/null)" = "$(image_recipe)" ]; then
        note "found in the cache: $image_dir (remove it to have it made again)"
        return 0
    fi
    [ "$(id -u)" -eq 0 ] || die "only root can make the guest image"
    need mmdebstrap=mmdebstrap mke2fs=e2fsprogs cpio=cpio
    rm -rf "$image_dir"
    mkdir -p "$image_dir"
    root=$image_dir/root

    note "downloading and unpacking Debian $image_suite (about a minute)"
    logged image-debian make_root_folder "$root"
    note "making the initrd"
    logged image-initrd make_initrd "$root" "$image_dir/initrd"
    cp "$root"/boot/vmlinuz-* "$image_dir/vmlinuz"
    note "making an ext4 image of the folder"
    truncate -s "$image_size" "$image_dir/base.raw"
    logged image-ext4 mke2fs -q -F -t ext4 -L addcow-base -d "$root" "$image_dir/base.raw"
    rm -rf "$root"
    image_recipe >"$image_dir/recipe"
}

# make_root_folder FOLDER: a minimal Debian with a kernel, without documentation.
make_root_folder() {
    local root=$1 path options=()
    local dropped=(/usr/share/doc /usr/share/man /usr/share/locale /usr/share/info)
    for path in "${dropped[@]}"; do options+=("--dpkgopt=path-exclude=$path/*"); done
    # The kernel is unpacked, not installed: installing it would build an initramfs nobody needs.
    # shellcheck disable=SC2016  # the hook's own shell expands it
    mmdebstrap --variant=minbase --include=busybox-static,kmod "${options[@]}" \
        --customize-hook='chroot "$1" sh -ec "
            cd /var/tmp
            kernel=\$(apt-cache depends linux-image-cloud-amd64 | sed -n \"s/.*Depends: //p\")
            apt-get -q -o APT::Sandbox::User=root download \$kernel
            dpkg-deb -x linux-image-*.deb /var/tmp/kernel
            cp -a kernel/boot kernel/lib /usr/
            mv /usr/boot/* /boot/
            rm -r /usr/boot kernel linux-image-*.deb
            depmod \$(ls /usr/lib/modules)"' \
        "$image_suite" "$root" ${ADDCOW_MIRROR:+"$ADDCOW_MIRROR"}
    install -m 755 "$repo/scripts/lib/guest-init" "$root/usr/sbin/init"
    echo addcow-guest >"$root/etc/hostname"
    echo '/dev/vda / ext4 defaults 0 1' >"$root/etc/fstab"
}

# make_initrd ROOT FILE: busybox and the disk's drivers out of ROOT, in cpio form.
make_initrd() {
    local root=$1 tree=$image_dir/initrd.tree module
    mkdir -p "$tree"/{bin,modules,proc,sys,dev,sysroot}
    cp "$root/usr/bin/busybox" "$tree/bin/"
    install -m 755 "$repo/scripts/lib/initrd-init" "$tree/init"
    for module in "${image_modules[@]}"; do
        cp "$root"/usr/lib/modules/*/kernel/drivers/"$module.ko" "$tree/modules/"
        echo "${module##*/}.ko" >>"$tree/modules/order"
    done
    make_cpio "$tree" >"$2"
    rm -rf "$tree"
}

# make_cpio FOLDER: prints FOLDER's files in the form the kernel unpacks. It unpacks several such
# archives one after the other, so a job is added to an initrd by appending its archive.
make_cpio() { (cd "$1" && find . | cpio -o -H newc --quiet); }
