// Command grpcshim is a shim of a third party, for tests: it speaks gRPC, and has a hako-shim, which lies beside it, do
// the work. It says that it makes mounts of type "format/..." itself, and notes in the bundle what it was given
// (file "rootfs-types"). Called as grpcshim-old it answers in JSON, speaks version 2 of the task service at an abstract
// address, and tells of its mounts in the way of older shims.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"

	bootstrap "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"
)

func main() {
	old := filepath.Base(os.Args[0]) == "grpcshim-old"
	err := errors.New("what?")
	switch action := os.Args[len(os.Args)-1]; action {
	case "start":
		err = start(old)
	case "delete":
		end()
		err = run(os.Stdin, os.Stdout, os.Args[1:]...)
	case "-info":
		err = info(old)
	case "serve":
		err = serve(os.Args[1])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// run runs the hako-shim.
func run(in io.Reader, out io.Writer, args ...string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	cmd := exec.Command(filepath.Join(filepath.Dir(self), "hako-shim"), args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = in, out, os.Stderr
	return cmd.Run()
}

// end ends the hako-shim of the bundle, which does not know that nobody speaks to it any more.
func end() {
	address, err := os.ReadFile("address")
	if err != nil {
		return
	}
	path := strings.TrimPrefix(string(address), "unix://")
	_ = os.Remove(path + ".grpc")
	conn, err := net.Dial("unix", path)
	if err != nil {
		return
	}
	gone := make(chan struct{})
	c := ttrpc.NewClient(conn, ttrpc.WithOnClose(func() { close(gone) }))
	defer c.Close()
	if err := c.Call(context.Background(), "containerd.task.v3.Task", "Shutdown", &task.ShutdownRequest{Now: true}, &emptypb.Empty{}); err == nil {
		<-gone
	}
}

func info(old bool) error {
	i := &types.RuntimeInfo{Name: "grpcshim"}
	if old {
		i.Annotations = map[string]string{"containerd.io/runtime-allow-mounts": "loop,format/*"}
	}
	raw, err := proto.Marshal(i)
	if err == nil {
		_, err = os.Stdout.Write(raw)
	}
	return err
}

func start(old bool) error {
	in, err := io.ReadAll(os.Stdin)
	if err != nil {
		return err
	}
	var params bootstrap.BootstrapParams
	if err := proto.Unmarshal(in, &params); err != nil {
		return err
	}
	if params.InstanceID == "" || params.ContainerdGrpcAddress == "" || params.ContainerdTtrpcAddress == "" || params.ContainerdBinary == "" {
		return fmt.Errorf("parameters are missing: %v", &params)
	}
	var out bytes.Buffer
	if err := run(bytes.NewReader(in), &out, os.Args[1:]...); err != nil {
		return err
	}
	var below bootstrap.BootstrapResult
	if err := proto.Unmarshal(out.Bytes(), &below); err != nil {
		return err
	}
	dir, err := os.Getwd()
	if err != nil {
		return err
	}
	path := strings.TrimPrefix(below.Address, "unix://") + ".grpc"
	if old {
		path = "@grpcshim" + dir
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return err
	}
	l.SetUnlinkOnClose(false)
	f, err := l.File()
	if err != nil {
		return err
	}
	server := exec.Command("/proc/self/exe", below.Address, "serve")
	server.ExtraFiles, server.SysProcAttr = []*os.File{f}, &syscall.SysProcAttr{Setsid: true}
	if err := server.Start(); err != nil {
		return err
	}
	r := &bootstrap.BootstrapResult{Version: 3, Address: "unix://" + path, Protocol: "grpc"}
	if old {
		r.Version = 2
		return json.NewEncoder(os.Stdout).Encode(r)
	}
	able, err := anypb.New(&types.MountCapabilities{Transforms: []string{"format"}})
	if err != nil {
		return err
	}
	r.Extensions = []*bootstrap.Extension{{Value: &anypb.Any{TypeUrl: "example.com/unknown", Value: []byte{1}}}, {Value: able}}
	raw, err := proto.Marshal(r)
	if err == nil {
		_, err = os.Stdout.Write(raw)
	}
	return err
}

// serve passes calls on, and ends with the shim at address.
func serve(address string) error {
	conn, err := net.Dial("unix", strings.TrimPrefix(address, "unix://"))
	if err != nil {
		return err
	}
	gone := make(chan struct{})
	client := ttrpc.NewClient(conn, ttrpc.WithOnClose(func() { close(gone) }))
	l, err := net.FileListener(os.NewFile(3, "listener"))
	if err != nil {
		return err
	}
	var over atomic.Bool
	s := grpc.NewServer(grpc.UnknownServiceHandler(func(_ any, stream grpc.ServerStream) error {
		name, _ := grpc.MethodFromServerStream(stream)
		service, method, _ := strings.Cut(strings.TrimPrefix(name, "/"), "/")
		in, out := new(emptypb.Empty), new(emptypb.Empty) // whose unknown fields are all there is
		if err := stream.RecvMsg(in); err != nil {
			return err
		}
		if method == "Create" {
			if err := mounts(in); err != nil {
				return err
			}
		}
		md, _ := metadata.FromIncomingContext(stream.Context())
		ctx := ttrpc.WithMetadata(stream.Context(), ttrpc.MD{"containerd-namespace-ttrpc": md.Get("containerd-namespace")})
		if err := client.Call(ctx, service, method, in, out); err != nil {
			return err
		}
		if err := stream.SendMsg(out); err != nil {
			return err
		}
		if method == "ShutdownSandbox" {
			over.Store(true)
		}
		if method == "Delete" && over.Load() { // it goes with the last container
			_ = client.Call(context.WithoutCancel(ctx), service, "Shutdown", &task.ShutdownRequest{}, &emptypb.Empty{})
		}
		return nil
	}))
	go func() {
		<-gone
		_ = os.Remove(strings.TrimPrefix(address, "unix://") + ".grpc")
		s.Stop()
	}()
	return s.Serve(l)
}

// mounts notes what there is to mount, and makes of it what a hako-shim can.
func mounts(in *emptypb.Empty) error {
	raw, err := proto.Marshal(in)
	if err != nil {
		return err
	}
	var r task.CreateTaskRequest
	if err := proto.Unmarshal(raw, &r); err != nil {
		return err
	}
	var note []string
	for _, m := range r.Rootfs {
		note = append(note, m.Type)
		m.Type = strings.TrimPrefix(m.Type, "format/")
	}
	if err := os.WriteFile(filepath.Join(r.Bundle, "rootfs-types"), []byte(strings.Join(note, " ")), 0o600); err != nil {
		return err
	}
	if raw, err = proto.Marshal(&r); err != nil {
		return err
	}
	return proto.Unmarshal(raw, in)
}
