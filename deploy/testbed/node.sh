# The first process of a node, in namespaces of its own: `sh node.sh FOLDER NAME`. What it mounts, only the node sees.
set -e
hostname "$2"
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -m 755 /run/sshd /run/munge /run/slurmd
for name in hosts passwd shadow slurm ssh; do
    mount --bind "$1/etc/$name" "/etc/$name"
done
ip link set lo up
: > "$1/run/$2.ready"
# An ignored SIGCHLD stays ignored behind exec: the kernel buries what is orphaned to this process.
exec env --ignore-signal=CHLD sleep infinity
