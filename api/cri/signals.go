package cri

import (
	"strings"

	api "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// signalName gives the name of a signal of the API: SIGNAL_SIGRTMINPLUS1 is SIGRTMIN+1. ""
// stands for the image's.
func signalName(s api.Signal) string {
	if s == api.Signal_SIGNAL_RUNTIME_DEFAULT {
		return ""
	}
	name := strings.TrimPrefix(s.String(), "SIGNAL_")
	name = strings.Replace(name, "PLUS", "+", 1)
	name = strings.Replace(name, "MINUS", "-", 1)
	return name
}

// wireSignal is the reverse. Without a signal it is SIGTERM that ends a container.
func wireSignal(name string) api.Signal {
	if name == "" {
		return api.Signal_SIGNAL_SIGTERM
	}
	name = "SIG" + strings.TrimPrefix(strings.ToUpper(name), "SIG")
	name = strings.NewReplacer("+", "PLUS", "-", "MINUS").Replace(name)
	if n, ok := api.Signal_value["SIGNAL_"+name]; ok {
		return api.Signal(n)
	}
	return api.Signal_SIGNAL_RUNTIME_DEFAULT
}
