package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
)

// A list on a file system that is mounted read-only is served, and read again.
func TestListOnReadOnlyMount(t *testing.T) {
	dir := t.TempDir()
	mounted := filepath.Join(dir, "mounted")
	if err := os.Mkdir(mounted, 0o755); err != nil {
		t.Fatal(err)
	}
	list := filepath.Join(mounted, "list")
	cmd := asCommand(t, "-listen", "127.0.0.1:0", "-reputation", list)
	const script = `mount -t tmpfs none "$1" && echo 198.51.100.7 >"$1/list" && mount -o remount,ro "$1" && ! touch "$1/list" && shift && exec "$@"`
	cmd.Args = append([]string{"sh", "-c", script, "sh", mounted}, cmd.Args...)
	cmd.Path = "/bin/sh"
	cmd.SysProcAttr = inNamespace()
	if err := (&exec.Cmd{Path: "/bin/true", SysProcAttr: inNamespace()}).Run(); err != nil {
		t.Skipf("no namespaces to mount in: %v", err)
	}
	p := startProcess(t, cmd, syscall.SIGKILL)
	p.await(t, `msg="list loaded" file=`+list+` entries=1(?s:.*)msg=listening`)
	p.cmd.Process.Signal(syscall.SIGHUP)
	p.await(t, `msg=reloading\b(?s:.*)msg="list loaded" file=`+list+` entries=1`)
}

// inNamespace returns what lets a process of any user mount for itself alone.
func inNamespace() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
	}
}

// A list that the agent may not read keeps it from starting, and stays in force
// if it was read before.
func TestUnreadableList(t *testing.T) {
	list := filepath.Join(t.TempDir(), "list")
	writeFile(t, list, "198.51.100.7\n")
	chmod := func(path string, mode os.FileMode) {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	for dir := filepath.Dir(list); filepath.Clean(dir) != filepath.Clean(os.TempDir()); dir = filepath.Dir(dir) {
		chmod(dir, 0o711)
	}
	start := func() *process {
		cmd := asCommand(t, "-listen", "127.0.0.1:0", "-reputation", list)
		if os.Getuid() == 0 { // who may read everything
			cmd.Path = "/proc/self/exe" // where others may not go
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		}
		return startProcess(t, cmd, syscall.SIGKILL)
	}
	chmod(list, 0)
	p := start()
	<-p.ctx.Done()
	if code := p.cmd.ProcessState.ExitCode(); code != 1 {
		t.Errorf("want exit status 1, have %d", code)
	}
	p.said(t, `^spoa: open `+list+`: permission denied\n$`)

	chmod(list, 0o644)
	p = start()
	p.await(t, `msg="list loaded"(?s:.*)msg=listening`)
	chmod(list, 0)
	p.await(t, `level=error msg="list not reloaded, previous content stays in force" .* reason=unreadable err="open `+list+`: permission denied"`)
	chmod(list, 0o644)
	p.await(t, `list not reloaded(?s:.*)msg="list loaded"`)
}
