package main

import (
	"testing"

	"github.com/stretchr/testify/require"
)

func TestCheck(t *testing.T) {
	of := func(stock, podfsm string) []row {
		return table(map[string]result{"a": {state: stock}, "b": {state: passed}}, map[string]result{"a": {state: podfsm}, "b": {state: passed}})
	}
	a, c := map[string]string{"a": "why"}, map[string]string{"c": "why"}
	for _, tc := range []struct {
		name  string
		rows  []row
		lists lists
		says  string // "" where all is well
	}{
		{"passes with both", of("passed", "passed"), lists{}, ""},
		{"fails with both", of("failed", "failed"), lists{}, ""},
		{"passes with podfsm alone", of("failed", "passed"), lists{}, ""},
		{"skipped with both", of("skipped", "skipped"), lists{}, ""},
		{"fails with podfsm", of("passed", "failed"), lists{}, "passed with stock, failed with podfsm: a"},
		{"skipped with podfsm", of("passed", "skipped"), lists{}, "passed with stock, skipped with podfsm: a"},
		{"panics with podfsm", of("passed", "panicked"), lists{}, "passed with stock, panicked with podfsm: a"},
		{"podfsm's report is too short", table(map[string]result{"a": {state: passed}}, nil), lists{}, "passed with stock, missing with podfsm: a"},
		{"a deviation", of("passed", "failed"), lists{deviations: a}, ""},
		{"a deviation that passes", of("passed", "passed"), lists{deviations: a}, "passed with podfsm, take it out of the deviations: a"},
		{"a deviation of stock's", of("failed", "failed"), lists{deviations: a}, "take it out of the deviations: a"},
		{"a deviation that is no spec", of("passed", "passed"), lists{deviations: c}, "critest has no such spec: c"},
		{"without an image", of("failed", "failed"), lists{withoutImages: a}, ""},
		{"with an image by now", of("passed", "passed"), lists{withoutImages: a}, "take it out of the specs without images: a"},
		{"without an image, and no spec", of("passed", "passed"), lists{withoutImages: c}, "critest has no such spec: c"},
		{"a race that is lost", of("passed", "skipped"), lists{races: []string{"a"}}, ""},
		{"a race that stock loses", of("skipped", "passed"), lists{races: []string{"a"}}, ""},
		{"a race that fails", of("passed", "failed"), lists{races: []string{"a"}}, "passed with stock, failed with podfsm: a"},
		{"a race that is no spec", of("passed", "passed"), lists{races: []string{"c"}}, "critest has no such spec: c"},
		{"listed, and fails with podfsm", of("passed", "failed"), lists{withoutImages: a}, "passed with stock, failed with podfsm: a"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			err := tc.lists.check(tc.rows)
			if tc.says == "" {
				require.NoError(t, err)
				return
			}
			require.ErrorContains(t, err, tc.says)
		})
	}
}

func TestEnough(t *testing.T) {
	require.ErrorContains(t, enough(map[string]result{"a": {state: passed}, "b": {state: "failed"}}, fewest), "1 specs pass with stock")
	require.ErrorContains(t, enough(map[string]result{"a": {state: skipped}}, 1), "0 specs pass with stock", "a focus that matches nothing")
	many := map[string]result{}
	for i := range fewest {
		many[string(rune('a'+i))] = result{state: passed}
	}
	require.NoError(t, enough(many, fewest))
}

func TestTableHasDifferencesFirst(t *testing.T) {
	stock := map[string]result{"a": {state: passed}, "b": {state: "failed"}, "c": {state: passed}, "d": {state: "skipped"}}
	podfsm := map[string]result{"a": {state: passed}, "b": {state: "failed"}, "c": {state: "failed"}, "d": {state: "skipped"}}
	var texts string
	for _, r := range table(stock, podfsm) {
		texts += r.text
	}
	require.Equal(t, "cbda", texts)
}

func TestParse(t *testing.T) {
	spec := func(kind, text, state string) string {
		return `{"ContainerHierarchyTexts": ["[k8s.io] X"], "LeafNodeType": "` + kind + `", "LeafNodeText": "` + text + `", "State": "` + state + `", "NumAttempts": 2, "Failure": {"Message": "why"}}`
	}
	got, err := parse([]byte(`[{"SpecReports": [` + spec("BeforeSuite", "", "passed") + `,` + spec("It", "a", "passed") + `,` + spec("It", "a", "failed") + `]}]`))
	require.NoError(t, err)
	require.Equal(t, map[string]result{"[k8s.io] X a": {passed, 2, "why"}, "[k8s.io] X a (2)": {"failed", 2, "why"}}, got)
	require.Equal(t, "passed at last", got["[k8s.io] X a"].String())
	require.True(t, got["[k8s.io] X a (2)"].failed())

	_, err = parse([]byte(`[{"SpecReports": [` + spec("BeforeSuite", "", "failed") + `]}]`))
	require.ErrorContains(t, err, "BeforeSuite")
	_, err = parse([]byte("Segmentation fault"))
	require.ErrorContains(t, err, "failed to read ginkgo's report")
}
