//go:build linux

package plan

import "golang.org/x/sys/unix"

// sysCall is a system call by number (of this architecture) and name.
type sysCall struct {
	nr   uintptr
	name string
}

var (
	sysOpenat2      = sysCall{unix.SYS_OPENAT2, "openat2"}
	sysOpenat       = sysCall{unix.SYS_OPENAT, "openat"}
	sysCloseRange   = sysCall{unix.SYS_CLOSE_RANGE, "close_range"}
	sysFsopen       = sysCall{unix.SYS_FSOPEN, "fsopen"}
	sysFspick       = sysCall{unix.SYS_FSPICK, "fspick"}
	sysFsconfig     = sysCall{unix.SYS_FSCONFIG, "fsconfig"}
	sysFsmount      = sysCall{unix.SYS_FSMOUNT, "fsmount"}
	sysOpenTree     = sysCall{unix.SYS_OPEN_TREE, "open_tree"}
	sysMoveMount    = sysCall{unix.SYS_MOVE_MOUNT, "move_mount"}
	sysMountSetattr = sysCall{unix.SYS_MOUNT_SETATTR, "mount_setattr"}
	sysMkdirat      = sysCall{unix.SYS_MKDIRAT, "mkdirat"}
	sysMknodat      = sysCall{unix.SYS_MKNODAT, "mknodat"}
	sysSymlinkat    = sysCall{unix.SYS_SYMLINKAT, "symlinkat"}
	sysFchownat     = sysCall{unix.SYS_FCHOWNAT, "fchownat"}
	sysFchmodat     = sysCall{unix.SYS_FCHMODAT, "fchmodat"}
	sysFchown       = sysCall{unix.SYS_FCHOWN, "fchown"}
	sysFsetxattr    = sysCall{unix.SYS_FSETXATTR, "fsetxattr"}
	sysFchdir       = sysCall{unix.SYS_FCHDIR, "fchdir"}
	sysChdir        = sysCall{unix.SYS_CHDIR, "chdir"}
	sysChroot       = sysCall{unix.SYS_CHROOT, "chroot"}
	sysPivotRoot    = sysCall{unix.SYS_PIVOT_ROOT, "pivot_root"}
	sysUmount       = sysCall{unix.SYS_UMOUNT2, "umount2"}
	sysFstat        = sysCall{unix.SYS_FSTAT, "fstat"}
	sysFstatfs      = sysCall{unix.SYS_FSTATFS, "fstatfs"}
	sysFaccessat2   = sysCall{unix.SYS_FACCESSAT2, "faccessat2"}
	sysGetcwd       = sysCall{unix.SYS_GETCWD, "getcwd"}
	sysRead         = sysCall{unix.SYS_READ, "read"}
	sysWrite        = sysCall{unix.SYS_WRITE, "write"}
	sysSendmsg      = sysCall{unix.SYS_SENDMSG, "sendmsg"}
	sysRecvmsg      = sysCall{unix.SYS_RECVMSG, "recvmsg"}
	sysIoctl        = sysCall{unix.SYS_IOCTL, "ioctl"}
	sysDup3         = sysCall{unix.SYS_DUP3, "dup3"}
	sysFcntl        = sysCall{unix.SYS_FCNTL, "fcntl"}
	sysPrctl        = sysCall{unix.SYS_PRCTL, "prctl"}
	sysSeccomp      = sysCall{unix.SYS_SECCOMP, "seccomp"}
	sysSetns        = sysCall{unix.SYS_SETNS, "setns"}
	sysUnshare      = sysCall{unix.SYS_UNSHARE, "unshare"}
	sysSetsid       = sysCall{unix.SYS_SETSID, "setsid"}
	sysSetgroups    = sysCall{unix.SYS_SETGROUPS, "setgroups"}
	sysSetresuid    = sysCall{unix.SYS_SETRESUID, "setresuid"}
	sysSetresgid    = sysCall{unix.SYS_SETRESGID, "setresgid"}
	sysCapset       = sysCall{unix.SYS_CAPSET, "capset"}
	sysPrlimit      = sysCall{unix.SYS_PRLIMIT64, "prlimit64"}
	sysUmask        = sysCall{unix.SYS_UMASK, "umask"}
	sysSethostname  = sysCall{unix.SYS_SETHOSTNAME, "sethostname"}
	sysSetdomain    = sysCall{unix.SYS_SETDOMAINNAME, "setdomainname"}
	sysKeyctl       = sysCall{unix.SYS_KEYCTL, "keyctl"}
	sysPersonality  = sysCall{unix.SYS_PERSONALITY, "personality"}
	sysSchedSetattr = sysCall{unix.SYS_SCHED_SETATTR, "sched_setattr"}
	sysAffinity     = sysCall{unix.SYS_SCHED_SETAFFINITY, "sched_setaffinity"}
	sysIoprioSet    = sysCall{unix.SYS_IOPRIO_SET, "ioprio_set"}
	sysMempolicy    = sysCall{unix.SYS_SET_MEMPOLICY, "set_mempolicy"}
	sysSocket       = sysCall{unix.SYS_SOCKET, "socket"}
	sysSigprocmask  = sysCall{unix.SYS_RT_SIGPROCMASK, "rt_sigprocmask"}
	sysSigaction    = sysCall{unix.SYS_RT_SIGACTION, "rt_sigaction"}
	sysClone        = sysCall{unix.SYS_CLONE, "clone"}
	sysExitGroup    = sysCall{unix.SYS_EXIT_GROUP, "exit_group"}
	sysExecveat     = sysCall{unix.SYS_EXECVEAT, "execveat"}
)
