package records

import (
	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/doctor"
	"github.com/podfsm/podfsm/journal"
	"github.com/podfsm/podfsm/lifecycle"
)

// Examination is what a doctor has found, in the words of the API.
func Examination(found []doctor.Finding) *podfsmv1.DoctorResponse {
	response := &podfsmv1.DoctorResponse{}
	for _, f := range found {
		response.Findings = append(response.Findings, &podfsmv1.Finding{
			Check:       f.Check,
			Subject:     f.Subject,
			Verdict:     string(f.Verdict),
			Evidence:    f.Evidence,
			Remedy:      f.Remedy,
			RefusedPods: string(f.Stops),
		})
	}
	return response
}

// Damaged are the files of a ledger that are damaged, or are kept aside because they were.
func Damaged(damage []journal.Damage, aside []string) (damaged []doctor.Damaged) {
	reasons := map[string]string{}
	for _, d := range damage {
		switch {
		case d.Kept != "":
			reasons[d.Kept] = d.Reason
		case !d.Torn:
			damaged = append(damaged, doctor.Damaged{File: d.File, Reason: d.Reason})
		}
	}
	for _, file := range aside {
		damaged = append(damaged, doctor.Damaged{File: file, Reason: reasons[file]})
	}
	return damaged
}

// Owing is how many sandboxes owe a cleanup.
func Owing(views []lifecycle.View) (n int) {
	for _, view := range views {
		if view.Pending() {
			n++
		}
	}
	return n
}
