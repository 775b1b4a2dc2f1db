# Makes a node's root filesystem: rootfs DIRECTORY RELEASE ARCH PACKAGE...
dir=$1 release=$2 arch=$3
shift 3
root=$dir/root
include=$*

# Debian's packages run their scripts while they are installed. Where the kernel doesn't know yet how to run arm64's programs, it learns it
# for that time. The magic is the head of an ELF executable for that machine (elf(5)).
binfmt=/proc/sys/fs/binfmt_misc
if [ "$arch" = arm64 ] && [ "$(uname -m)" != aarch64 ]; then
	[ -e $binfmt/register ] || mount -t binfmt_misc binfmt_misc $binfmt
	if ! grep -qs '^interpreter.*qemu-aarch64' $binfmt/*; then
		interpreter=$(command -v qemu-aarch64-static)
		magic='\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00'
		mask='\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff'
		trap 'echo -1 >$binfmt/podfsm-lab' EXIT
		printf '%s' ":podfsm-lab:M::$magic:$mask:$interpreter:F" >$binfmt/register
	fi
fi
debootstrap --arch="$arch" --variant=minbase --include="${include// /,}" "$release" "$root"
umount -R "$root/proc" "$root/sys" 2>/dev/null || true

cat >"$root/etc/fstab" <<END
/dev/vda / ext4 defaults 0 1
/dev/vdb /lab ext4 defaults 0 0
END
echo node >"$root/etc/hostname"
echo "127.0.0.1 localhost node" >"$root/etc/hosts"
mkdir -p "$root/lab" "$root/var/log/journal"
chroot "$root" passwd --delete root

# A shell on the console, for make node-shell.
mkdir -p "$root/etc/systemd/system/serial-getty@ttyS0.service.d"
cat >"$root/etc/systemd/system/serial-getty@ttyS0.service.d/login.conf" <<END
[Service]
ExecStart=
ExecStart=-/sbin/agetty --autologin root --noclear %I linux
END

# What the lab outside talks to. Tests make cgroups below its own.
cat >"$root/etc/systemd/system/lab.service" <<END
[Unit]
Description=Runs what the lab asks for
RequiresMountsFor=/lab
[Service]
ExecStartPre=/bin/sh -c 'dev=\$\$(ls /sys/class/net | grep ^e); ip address add 10.0.2.15/24 dev \$\$dev; ip link set \$\$dev up; ip route add default via 10.0.2.2'
ExecStart=/lab/.build/bin/agent
Delegate=yes
KillMode=process
LimitNOFILE=1048576
TasksMax=infinity
[Install]
WantedBy=multi-user.target
END
chroot "$root" systemctl enable lab.service
# What only makes the boot longer.
chroot "$root" systemctl mask systemd-timesyncd.service apt-daily.timer apt-daily-upgrade.timer e2scrub_reap.service

cp -L "$root/vmlinuz" "$root/initrd.img" "$dir/"
# What programs for this platform are built with, and what its images have.
mkdir "$dir/sysroot"
(cd "$root" && cp -a --parents usr/include/seccomp*.h usr/lib/*-linux-gnu/libseccomp.* usr/lib/*-linux-gnu/pkgconfig/libseccomp.pc "$dir/sysroot/")
cp "$root/bin/busybox" "$dir/sysroot/"
mkfs.ext4 -q -F -d "$root" -L root "$dir/root.img" 12G
rm -rf "$root"
