# Makes a node's root filesystem: rootfs DIRECTORY RELEASE PACKAGE...
dir=$1 release=$2
shift 2
root=$dir/root
include=$*
debootstrap --variant=minbase --include="${include// /,}" "$release" "$root"
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
mkfs.ext4 -q -F -d "$root" -L root "$dir/root.img" 12G
rm -rf "$root"
