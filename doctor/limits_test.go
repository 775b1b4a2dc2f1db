package doctor

import (
	"testing"

	"github.com/stretchr/testify/require"
)

func TestNearLimit(t *testing.T) {
	const (
		root  = "    0:   170 169/169 900/1000 1000/25000000\n"
		keys  = " 1000:     5 5/5 160/200 100/20000\n"
		bytes = " 1001:     5 5/5 1/200 16000/20000\n"
		calm  = " 1002:     5 5/5 159/200 15999/20000\n"
		none  = " 1003:     0 0/0 0/0 0/0\n"
		held  = " 1004:     1 1/1 1/0 9/0\n"
	)
	for _, test := range []struct{ users, user, remedy string }{
		{"", "", ""},
		{calm + none + held + "what is this\n", "", ""},
		{calm + keys + bytes, "user 1000 has 160 keys of 100 bytes", keysRemedy},
		{none + bytes, "user 1001 has 1 keys of 16000 bytes", keysRemedy},
		{keys + root, "user 0 has 900 keys of 1000 bytes", rootKeysRemedy},
	} {
		user, remedy := nearLimit(test.users)
		require.Equal(t, test.user, user, test.users)
		require.Equal(t, test.remedy, remedy, test.users)
	}
}
