// Command agent runs commands in a virtual machine for the lab. Anyone who reaches its port is root
// in the machine, whose network only leads to the lab.
package main

import (
	"errors"
	"io"
	"log"
	"net/http"
	"os/exec"
	"strconv"
)

// Address is the address on which the agent listens.
const address = ":1024"

// exitCode is the trailer with the exit code of the command. Without it, the command was
// interrupted.
const exitCode = "Exit-Code"

func main() {
	http.HandleFunc("POST /run", run)
	log.Fatal(http.ListenAndServe(address, nil))
}

// run runs the script in the body of the request and streams its output. The script is killed with
// the request.
func run(w http.ResponseWriter, r *http.Request) {
	script, err := io.ReadAll(r.Body)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	w.Header().Set("Trailer", exitCode)
	w.WriteHeader(http.StatusOK)
	out := flushing{w, http.NewResponseController(w)}
	cmd := exec.CommandContext(r.Context(), "/bin/bash", "-euo", "pipefail", "-c", string(script))
	cmd.Stdout, cmd.Stderr = out, out
	err = cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		_, _ = io.WriteString(out, err.Error()+"\n")
	}
	w.Header().Set(exitCode, strconv.Itoa(cmd.ProcessState.ExitCode()))
}

// flushing sends every write at once.
type flushing struct {
	io.Writer
	*http.ResponseController
}

func (f flushing) Write(p []byte) (int, error) {
	n, err := f.Writer.Write(p)
	return n, errors.Join(err, f.Flush())
}
