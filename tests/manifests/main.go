// Decodes Kubernetes manifests into the types of the API, as strictly as the API server does with
// fieldValidation=Strict: a kind, a version or a field that does not exist is an error, and so is a
// field of the wrong type or one that is given twice. Prints what was decoded as a list in JSON, so
// that tests need no YAML of their own.
//
//	pando-manifests FILE...
package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	groupsnapshot "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumegroupsnapshot/v1"
	snapshot "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	apps "k8s.io/api/apps/v1"
	core "k8s.io/api/core/v1"
	rbac "k8s.io/api/rbac/v1"
	storage "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/runtime"
	serializer "k8s.io/apimachinery/pkg/runtime/serializer/json"
	"k8s.io/apimachinery/pkg/util/yaml"
)

// What the API server calls strict: unknown and repeated fields are errors.
func decoder() (runtime.Decoder, error) {
	scheme := runtime.NewScheme()
	builder := runtime.NewSchemeBuilder(apps.AddToScheme, core.AddToScheme, rbac.AddToScheme,
		storage.AddToScheme, snapshot.AddToScheme, groupsnapshot.AddToScheme)
	options := serializer.SerializerOptions{Yaml: true, Strict: true}
	return serializer.NewSerializerWithOptions(serializer.DefaultMetaFactory, scheme, scheme, options),
		builder.AddToScheme(scheme)
}

// The documents of a file, each as it was decoded.
func documents(path string, decoder runtime.Decoder) ([]runtime.Object, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	reader := yaml.NewYAMLReader(bufio.NewReader(bytes.NewReader(text)))
	var decoded []runtime.Object
	for number := 1; ; number++ {
		document, err := reader.Read()
		if errors.Is(err, io.EOF) {
			return decoded, nil
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		object, _, err := decoder.Decode(document, nil, nil)
		if err != nil {
			return nil, fmt.Errorf("%s: document %d: %w", path, number, err)
		}
		decoded = append(decoded, object)
	}
}

func run(paths []string) error {
	decoder, err := decoder()
	if err != nil {
		return err
	}
	all := []runtime.Object{}
	for _, path := range paths {
		decoded, err := documents(path, decoder)
		if err != nil {
			return err
		}
		all = append(all, decoded...)
	}
	return json.NewEncoder(os.Stdout).Encode(all)
}

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
}
